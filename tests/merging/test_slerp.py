from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import MergedInPlace, make_method, merge
from tests.merging.formulas import (
    close,
    golden,
    golden_deltas,
    merged,
    relative_error,
    several_chunks,
)

seeds = st.integers(0, 9999)


def arc(deltas: list[Tensor], t: float) -> Tensor:
    """Shoemake, section 3.3, for vectors of any length."""
    first, second = (delta.double() for delta in deltas)
    angle = torch.acos(((first * second).sum() / first.norm() / second.norm()).clamp(-1, 1))
    if float(angle.sin()) < 1e-6:
        return (1 - t) * first + t * second
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / angle.sin()


@given(
    seed=seeds,
    shared=st.sampled_from([0.0, 1.0, 30.0, 3000.0, -0.5]),
    factors=st.tuples(st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([0.0, 0.5, 1.0])),
)
def test_is_the_formula(seed: int, shared: float, factors: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(40, generator=generator)
    deltas = [first, shared * first + torch.randn(40, generator=generator)]
    t = factors[1] / sum(factors)
    close(merged(make_method("slerp"), deltas, factors), arc(deltas, t), deltas, [3.0, 3.0])


def test_over_several_chunks() -> None:
    deltas = several_chunks(2)
    close(merged(make_method("slerp"), deltas, [1.0, 2.0]), arc(deltas, 2 / 3), deltas, [1.0, 1.0])


def test_agrees_with_mergekit() -> None:
    stored = golden("slerp")
    ours = merged(make_method("slerp"), golden_deltas(stored), [1.0, 0.5])
    assert relative_error(ours, stored["merged"]) < 1e-5


@given(seed=seeds, t=st.floats(0, 1))
def test_length_is_kept_and_the_angle_is_shared_out(seed: int, t: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.nn.functional.normalize(torch.randn(50, generator=generator), dim=0) for _ in range(2)]
    between = merged(make_method("slerp"), deltas, [1 - t, t]).double()
    assert float(between.norm()) == pytest.approx(1, abs=1e-5)
    whole = math.acos(float(deltas[0].double() @ deltas[1].double()))
    assert math.acos(min(1.0, float(deltas[0].double() @ between))) == pytest.approx(t * whole, abs=1e-3)


def test_without_an_angle_it_is_a_line() -> None:
    delta = torch.tensor([1.0, -2.0])
    for other, expected in ((3 * delta, 2 * delta), (-3 * delta, -delta), (torch.zeros(2), delta / 2)):
        assert torch.equal(merged(make_method("slerp"), [delta, other], [1.0, 1.0]), expected)
    assert torch.equal(merged(make_method("slerp"), [None, delta], [1.0, 1.0]), delta / 2)


def test_the_step_from_arc_to_line_is_too_small_to_see() -> None:
    first = torch.tensor([1.0, 0.0])
    for angle in (0.99e-3, 1.01e-3):
        second = torch.tensor([math.cos(angle), math.sin(angle)])
        close(
            merged(make_method("slerp"), [first, second], [1.0, 1.0]),
            arc([first, second], 0.5),
            [first, second],
            [1.0, 1.0],
        )


def test_weights_that_cancel_give_nothing() -> None:
    assert not merged(make_method("slerp"), [torch.ones(3), torch.ones(3)], [1.0, -1.0]).any()


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_experts_is_refused_at_once(count: int) -> None:
    base = {"layer.weight": torch.zeros(2, 2)}
    experts = [{"layer.weight": torch.ones(2, 2)}] * count
    with pytest.raises(OptionError, match=f"slerp is for exactly two experts, not {count}"):
        merge(base, experts, "slerp")
    with pytest.raises(OptionError, match=f"slerp is for exactly two experts, not {count}"):
        merge(base, experts, overrides={"layer": {"method": "slerp"}})
    model = torch.nn.Linear(2, 2)
    with pytest.raises(OptionError, match=f"slerp is for exactly two experts, not {count}"):
        MergedInPlace(model, model, [model] * (count - 1), "slerp")
    with pytest.raises(OptionError, match=f"slerp is for exactly two experts, not {count}"):
        merged(make_method("tsv_m", rest="slerp"), [torch.ones(3)] * count, [1.0] * count)
