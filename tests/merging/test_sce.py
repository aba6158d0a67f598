from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import make_method
from tests.merging.formulas import golden, golden_deltas, merged, relative_error

seeds = st.integers(0, 9999)
weights = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])


def normal(seed: int, count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def paper(deltas: list[Tensor], factors: list[float], density: float) -> Tensor:
    """Wan et al., SCE: select by variance, weigh by mean squares, erase the minority's sign; in float64."""
    stacked = torch.stack([d.double().reshape(-1) for d in deltas])
    factor = torch.tensor(factors, dtype=torch.float64).reshape(-1, 1)
    present = stacked[factor.reshape(-1) != 0]
    if density < 1 and len(present) > 1:
        variance = present.var(0, unbiased=False)
        count = max(1, int(density * int((variance > 0).sum()) + 1e-9))
        kept = torch.zeros(stacked.shape[1], dtype=torch.float64)
        kept[torch.from_numpy(np.argsort(-variance.numpy(), kind="stable"))[:count]] = 1
        stacked = stacked * kept
    importance = factor.abs() * stacked.square().sum(1, keepdim=True)
    signed = stacked * factor.sign()
    elected = (stacked * factor).sum(0).sign()
    agrees = (signed.sign() == elected) & (signed != 0)
    total, divisor = (importance * signed * agrees).sum(0), (importance * agrees).sum(0)
    return torch.where(divisor > 0, total / divisor.clamp(min=1e-300), 0.0).reshape(deltas[0].shape)


@given(seed=seeds, count=st.integers(1, 4), density=st.sampled_from([0.05, 0.3, 0.9, 1.0]), data=st.data())
def test_is_the_paper_s_formula(seed: int, count: int, density: float, data: st.DataObject) -> None:
    deltas = normal(seed, count, 90)
    factors = [data.draw(weights) for _ in deltas]
    ours = merged(make_method("sce", density=density), deltas, factors)
    torch.testing.assert_close(ours.double(), paper(deltas, factors, density), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_over_several_chunks(density: float) -> None:
    deltas, factors = normal(3, 3, 300, 2000), [1.0, 0.5, 2.0]
    ours = merged(make_method("sce", density=density), deltas, factors)
    assert relative_error(ours, paper(deltas, factors, density)) < 1e-3  # signs of sums that nearly cancel


def test_agrees_with_mergekit() -> None:
    stored = golden("sce")
    ours = merged(make_method("sce", density=0.25), golden_deltas(stored), [1.0] * 3)
    assert relative_error(ours, stored["merged"]) < 1e-5


def test_one_expert_stays_itself_and_equal_ones_have_nothing_to_select() -> None:
    a, b = normal(0, 2, 50)
    method = make_method("sce")
    assert torch.equal(merged(method, [a], [1.0]), a)
    assert torch.equal(merged(method, [a, b], [1.0, 0.0]), a)
    assert not merged(method, [a, a], [1.0, 1.0]).any()
    torch.testing.assert_close(merged(make_method("sce", density=1.0), [a, a], [0.5, 0.5]), a)


@given(seed=seeds, density=st.sampled_from([0.2, 1.0]), data=st.data())
def test_order_does_not_matter_and_opposites_are_nothing(
    seed: int, density: float, data: st.DataObject
) -> None:
    deltas, method = normal(seed, 3, 40), make_method("sce", density=density)
    order = data.draw(st.permutations(range(3)))
    straight, shuffled = (merged(method, found, [1.0] * 3) for found in (deltas, [deltas[i] for i in order]))
    torch.testing.assert_close(shuffled, straight, rtol=1e-4, atol=1e-6)
    assert not merged(method, [deltas[0], deltas[0]], [1.0, -1.0]).any()


@pytest.mark.parametrize("density", [0, 1.5, "a"])
def test_densities_outside_the_range_are_refused(density: object) -> None:
    with pytest.raises(OptionError, match=r"`density` must be in \(0, 1\]"):
        make_method("sce", density=density)
