from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics import SignConflictAccumulator, chance_conflict
from tests.metrics.chunks import Values, cuts, experts, feed, flat, in_parts, long_experts


def exact_pairs(found: list[Values]) -> np.ndarray:
    rows = flat(found).numpy()
    count = len(rows)
    shares = np.full((count, count), np.nan)
    for i, j in itertools.product(range(count), repeat=2):
        both = (rows[i] != 0) & (rows[j] != 0)
        if both.any():
            shares[i, j] = np.mean((rows[i] > 0)[both] != (rows[j] > 0)[both])
    return shares


def exact_together(found: list[Values]) -> tuple[float, float]:
    """The conflict of all, and the same over what chance would give at each coordinate."""
    signs = np.sign(flat(found).numpy())
    present = (signs != 0).sum(0)
    shared = present >= 2
    if not shared.any():
        return math.nan, math.nan
    conflict = 1 - np.abs(signs.sum(0))[shared] / present[shared]
    chance = np.array([brute_force(int(m)) for m in present[shared]])
    return float(conflict.mean()), float(conflict.sum() / chance.sum())


@functools.cache
def brute_force(count: int) -> float:
    """The mean conflict over all 2ⁿ sign patterns."""
    patterns = itertools.product((-1, 1), repeat=count)
    return sum(1 - abs(sum(pattern)) / count for pattern in patterns) / 2**count


def check(ours: SignConflictAccumulator, found: list[Values]) -> None:
    np.testing.assert_allclose(ours.pairwise().numpy(), exact_pairs(found), rtol=0, atol=1e-12)
    together, normalised = exact_together(found)
    assert ours.of_all() == pytest.approx(together, rel=1e-6, abs=1e-9, nan_ok=True)
    assert ours.normalised() == pytest.approx(normalised, rel=1e-6, abs=1e-9, nan_ok=True)


@given(found=experts(most=5))
def test_conflicts(found: list[Values]) -> None:
    check(feed(SignConflictAccumulator(len(found)), found), found)


def test_conflicts_over_several_chunks() -> None:
    found = long_experts(4)
    found[2]["long"][::3] = 0
    found[3]["long"][1::2] = 0
    check(feed(SignConflictAccumulator(4), found), found)


@given(found=experts(most=5), cuts=cuts, count=st.integers(1, 4))
def test_parts_add_up(found: list[Values], cuts: list[float], count: int) -> None:
    parts = [SignConflictAccumulator(len(found)) for _ in range(count)]
    check(in_parts(parts, found, cuts), found)


@given(found=experts(most=5))
def test_the_first_row_alone(found: list[Values]) -> None:
    first = feed(SignConflictAccumulator(len(found), first_row_only=True), found)
    np.testing.assert_allclose(first.pairwise().numpy(), exact_pairs(found)[:1], rtol=0, atol=1e-12)
    assert math.isnan(first.of_all())
    assert math.isnan(first.normalised())


def test_agreement_is_zero_and_opposition_one() -> None:
    a = {"x": torch.tensor([1.0, -2.0, 3.0, 0.0])}
    agreeing = feed(SignConflictAccumulator(2), [a, {"x": 5 * a["x"]}])
    assert (agreeing.pairwise()[0, 1], agreeing.of_all(), agreeing.normalised()) == (0, 0, 0)
    opposing = feed(SignConflictAccumulator(2), [a, {"x": -a["x"]}])
    assert (opposing.pairwise()[0, 1], opposing.of_all(), opposing.normalised()) == (1, 1, 2)


def test_signs_of_the_smallest_numbers_count() -> None:
    tiny = {"x": torch.tensor([1e-45, -1e-45, 1e-30])}
    conflict = feed(SignConflictAccumulator(2), [tiny, {"x": torch.tensor([1.0, 1.0, 1.0])}])
    assert float(conflict.pairwise()[0, 1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", range(2, 13))
def test_chance_equals_enumeration(count: int) -> None:
    assert chance_conflict(count) == pytest.approx(brute_force(count), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_random_signs_are_at_chance(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    numel = 40_000
    found = [{"x": torch.randn(numel, generator=generator)} for _ in range(count)]
    conflict = feed(SignConflictAccumulator(count), found)
    # One coordinate's conflict lies in [0, 1], so its deviation is at most one half: five sigma of the mean.
    margin = 5 * 0.5 / math.sqrt(numel) / chance_conflict(count)
    assert conflict.normalised() == pytest.approx(1.0, abs=margin)
    others = conflict.pairwise()[~torch.eye(count, dtype=torch.bool)]
    assert float((others - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(numel)


def test_layouts_must_agree() -> None:
    two, three = SignConflictAccumulator(2), SignConflictAccumulator(3, first_row_only=True)
    assert two.sums.shape == three.sums.shape  # equally long, and yet not the same sums
    with pytest.raises(OptionError, match="another layout"):
        two.merge(three)
    with pytest.raises(OptionError, match="another layout"):
        two.merge(SignConflictAccumulator(4))
