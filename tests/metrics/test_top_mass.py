from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.metrics import TopMassAccumulator
from tests.metrics.chunks import Values, cuts, experts, feed, flat, in_parts, long_experts, values

shares = st.sampled_from([0.001, 0.01, 0.1, 0.29, 0.5, 0.999, 1.0]) | st.floats(1e-3, 1)


def exact(row: Tensor, top: float) -> float:
    """Sort, and split the entry at the border where the share is no whole number of entries."""
    mass = row.double().abs().sort(descending=True).values.square()
    wanted = top * len(mass)
    whole = min(math.floor(wanted + 1e-9), len(mass))
    part = (wanted - whole) * float(mass[whole]) if whole < len(mass) else 0.0
    total = float(mass.sum())
    return (float(mass[:whole].sum()) + part) / total if total else math.nan


def tolerance(row: Tensor, top: float) -> float:
    """One bin, 0.1 % wide, is split evenly: at most a 2000th of its mass is misplaced."""
    mass = row.double().abs().sort(descending=True).values
    border = float(mass[min(len(mass) - 1, math.floor(top * len(mass)))])
    near = mass[(mass >= border * (1 - 2**-10)) & (mass <= border * (1 + 2**-10))]
    return 1e-6 + float(near.square().sum() / mass.square().sum()) / 2000


def check(ours: TopMassAccumulator, row: Tensor, top: float) -> None:
    expected = exact(row, top)
    if math.isnan(expected):
        assert math.isnan(ours.share(top))
    else:
        assert ours.share(top) == pytest.approx(expected, rel=0, abs=tolerance(row, top))


@given(found=experts(), top=shares)
def test_share_of_the_mass(found: list[Values], top: float) -> None:
    for expert, row in enumerate(flat(found)):
        if len(row):
            check(feed(TopMassAccumulator(expert), found), row, top)


@given(found=experts(), top=shares, cuts=cuts, count=st.integers(1, 3))
def test_parts_add_up(found: list[Values], top: float, cuts: list[float], count: int) -> None:
    row = flat(found)[0]
    if len(row):
        check(in_parts([TopMassAccumulator() for _ in range(count)], found, cuts), row, top)


@given(found=experts(), asked=st.lists(shares, min_size=1, max_size=3))
def test_what_processes_tell_each_other_is_little_and_enough(found: list[Values], asked: list[float]) -> None:
    """Of two that saw the same, the sum has the same shares."""
    sent = 0

    def double(tensors: Sequence[Tensor]) -> None:
        nonlocal sent
        for tensor in tensors:
            tensor.mul_(2)
            sent += tensor.numel() * tensor.element_size()

    mass = feed(TopMassAccumulator(), found)
    before = [mass.share(top) for top in asked]
    mass.add_up(double, asked)
    for top, expected in zip(asked, before, strict=True):
        assert mass.share(top) == pytest.approx(expected, rel=1e-12, abs=0, nan_ok=True)
    assert sent <= 4096 + len(asked) * 16384


def test_share_of_a_large_task_vector_is_exact_to_a_millionth() -> None:
    found = long_experts(2)
    for expert, row in enumerate(flat(found)):
        mass = feed(TopMassAccumulator(expert), found)
        for top in (0.001, 0.01, 0.1, 0.2, 0.5, 0.9):
            assert mass.share(top) == pytest.approx(exact(row, top), rel=0, abs=1e-6)


def test_ties_share_their_mass_evenly() -> None:
    found = [{"x": torch.tensor([2.0] * 10 + [1.0] * 30)}]
    mass = feed(TopMassAccumulator(), found)
    assert mass.share(0.25) == pytest.approx(40 / 70)
    assert mass.share(0.125) == pytest.approx(20 / 70)
    assert mass.share(0.5) == pytest.approx(50 / 70)


def test_the_whole_has_all_the_mass() -> None:
    for kind in ("normal", "heavy tails", "sparse", "ties"):
        assert feed(TopMassAccumulator(), [{"x": values((999,), kind, 1e-6, 3)}]).share(1.0) == pytest.approx(
            1, abs=1e-12
        )


def test_signs_and_scale_do_not_matter() -> None:
    row = values((5000,), "normal", 1.0, 0)
    share = feed(TopMassAccumulator(), [{"x": row}]).share(0.1)
    assert feed(TopMassAccumulator(), [{"x": -row}]).share(0.1) == share
    assert feed(TopMassAccumulator(), [{"x": row * 2.0**-60}]).share(0.1) == pytest.approx(share, abs=1e-12)


def test_nothing_has_no_share() -> None:
    assert math.isnan(TopMassAccumulator().share(0.5))
    assert math.isnan(feed(TopMassAccumulator(), [{"x": torch.zeros(5)}]).share(0.5))


@pytest.mark.parametrize("top", [0, -0.1, 1.1, math.nan])
def test_shares_outside_the_range_are_refused(top: float) -> None:
    with pytest.raises(OptionError, match="`top` must be in"):
        TopMassAccumulator().share(top)


def test_different_experts_do_not_add_up() -> None:
    with pytest.raises(OptionError, match="another layout"):
        TopMassAccumulator(0).merge(TopMassAccumulator(1))
