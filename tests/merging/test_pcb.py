from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import make_method
from tests.merging.formulas import golden, golden_deltas, merged, relative_error, several_chunks

seeds = st.integers(0, 9999)
weights = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])


def normal(seed: int, count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def formula(deltas: list[Tensor], factors: list[float], density: float, clip: float) -> Tensor:
    """Du et al. as in the authors' pcb-merging.py, sorted and in float64, with weights as the docstring says."""
    mean = sum(abs(w) for w in factors) / max(1, sum(w != 0 for w in factors))
    parts = [(w / mean, d.double().reshape(-1)) for w, d in zip(factors, deltas, strict=True) if w != 0]
    size = deltas[0].numel()
    top, bottom = torch.zeros(size).double(), torch.zeros(size).double()
    total = sum((w * d for w, d in parts), torch.zeros(size).double())
    cut = math.floor(clip * size)
    for w, d in parts:
        ranked = d.abs().sort().values
        low, high = ranked[cut], ranked[size - 1 - cut]
        clipped = d.abs().clamp(low, high)
        score = torch.exp(len(parts) * ((clipped - low) / (high - low)) ** 2) * torch.tanh(w * d * total)
        order = score.sort().values
        least, most = order[size - max(1, math.floor(density * size + 1e-9))], order[-1]
        share = (score.clamp(min=least) - least) / (most - least)
        top += w * share * clipped * d.sign()
        bottom += abs(w) * share
    return (top / bottom.clamp(min=1e-12)).reshape(deltas[0].shape)


@given(
    seed=seeds,
    count=st.integers(1, 4),
    density=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    clip=st.sampled_from([0.0, 1e-4, 0.1]),
    data=st.data(),
)
def test_is_the_formula(seed: int, count: int, density: float, clip: float, data: st.DataObject) -> None:
    deltas = normal(seed, count, 90)
    factors = [data.draw(weights) for _ in deltas]
    ours = merged(make_method("pcb", density=density, clip=clip), deltas, factors)
    exact = formula(deltas, factors, density, clip)
    # Where all shares are next to zero, their quotient is a matter of rounding.
    assert float(((ours - exact).abs() > 1e-3).double().mean()) <= 0.03
    assert relative_error(ours, exact) < 1e-2 if exact.any() else not ours.any()


def test_agrees_with_the_authors_code() -> None:
    stored = golden("pcb")
    ours = merged(make_method("pcb", density=1 / 8, clip=1 / 64), golden_deltas(stored), [1.0] * 3)
    assert relative_error(ours, stored["merged"]) < 1e-5


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_over_several_chunks(density: float) -> None:
    deltas = normal(3, 3, 300, 2000)
    ours = merged(make_method("pcb", density=density), deltas, [1.0, 0.5, 2.0])
    assert relative_error(ours, formula(deltas, [1.0, 0.5, 2.0], density, 1e-4)) < 1e-4


def test_what_all_say_wins_and_what_conflicts_loses() -> None:
    first = torch.tensor([3.0, 2.0, 0.1, 2.0, 0.2, 0.1, 0.3, 0.1, 0.2, 0.1])
    second = torch.tensor([3.0, -2.1, 0.1, 1.5, 0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
    ours = merged(make_method("pcb", density=0.3, clip=0.0), [first, second], [1.0, 1.0])
    assert ours[0] == pytest.approx(3.0)
    assert ours[1] == 0
    assert int((ours != 0).sum()) == 2  # the third highest score is the border, whose share is 0


def test_weights_set_proportions_only_and_zero_takes_an_expert_out() -> None:
    a, b, c = normal(0, 3, 200)
    method = make_method("pcb", density=0.5)
    assert torch.equal(merged(method, [a, b], [0.25, -0.75]), merged(method, [a, b], [1.0, -3.0]))
    assert torch.equal(merged(method, [a, c, b], [1.0, 0.0, 2.0]), merged(method, [a, b], [1.0, 2.0]))


@given(seed=seeds, count=st.integers(2, 4), data=st.data())
def test_order_does_not_matter(seed: int, count: int, data: st.DataObject) -> None:
    deltas, method = normal(seed, count, 64), make_method("pcb", density=0.25)
    order = data.draw(st.permutations(range(count)))
    straight = merged(method, deltas, [1.0] * count)
    shuffled = merged(method, [deltas[i] for i in order], [1.0] * count)
    torch.testing.assert_close(shuffled, straight, rtol=1e-3, atol=1e-5)


@given(seed=seeds)
def test_twins_are_as_one_and_opposites_are_nothing(seed: int) -> None:
    (a,), method = normal(seed, 1, 64), make_method("pcb", density=0.25)
    torch.testing.assert_close(merged(method, [a, a], [0.5, 0.5]), merged(method, [a], [1.0]))
    assert not merged(method, [a, a], [1.0, -1.0]).any()


def test_experts_without_a_say() -> None:
    a, method = torch.randn(50), make_method("pcb", density=0.5)
    alone = merged(method, [a], [1.0])
    assert alone.any()
    for other in (None, torch.zeros(50)):
        found = merged(method, [a, other], [1.0, 1.0])
        assert torch.equal(found != 0, alone != 0)
    assert not merged(method, [torch.zeros(50)], [1.0]).any()
    assert merged(method, [torch.tensor([2.0])], [1.0]).tolist() == [2.0]
    assert merged(method, [torch.full((4,), -3.0)], [1.0]).tolist() == [-3.0] * 4


@pytest.mark.parametrize("clip", [-0.1, 0.5, float("nan"), "a"])
def test_clips_outside_the_range_are_refused(clip: object) -> None:
    with pytest.raises(OptionError, match=r"`clip` must be in \[0, 0.5\)"):
        make_method("pcb", clip=clip)


def test_over_several_chunks_on_a_grid() -> None:
    deltas = several_chunks(2)
    ours = merged(make_method("pcb"), deltas, [1.0, 1.0])
    assert 0.0 < float((ours != 0).double().mean()) < 0.2
