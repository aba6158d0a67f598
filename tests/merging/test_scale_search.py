from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.merging.scale_search import check_scales, search_scale

grids = st.lists(st.integers(1, 30).map(lambda tenths: tenths / 10), min_size=1, max_size=5, unique=True)


class Metric:
    """A function of the scale that counts its calls."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function
        self.calls: list[float] = []

    def __call__(self, scale: float) -> float:
        assert scale not in self.calls, "no scale needs to be tried twice"
        self.calls.append(scale)
        return self.function(scale)


def peak(at: float) -> Callable[[float], float]:
    return lambda scale: -abs(math.log(scale / at))


@given(grid=grids, at=st.floats(0.01, 50), greater=st.booleans())
def test_a_single_peak_is_found_and_enclosed(grid: list[float], at: float, greater: bool) -> None:
    metric = Metric(peak(at) if greater else lambda scale: -peak(at)(scale))
    found = search_scale(metric, grid, greater_is_better=greater, max_evaluations=10_000)
    assert found.inside
    assert set(found.tried) == set(metric.calls)
    best = max(found.tried, key=lambda scale: peak(at)(scale))
    assert found.value == metric.function(best)
    tried = list(found.tried)
    position = tried.index(found.best)
    assert 0 < position < len(tried) - 1
    below, above = tried[position - 1], tried[position + 1]
    assert below < at < above  # a single peak cannot lie beyond its best neighbours
    assert all(peak(at)(scale) <= peak(at)(found.best) for scale in tried)


@given(grid=grids, at=st.floats(0.01, 50), most=st.integers(1, 12))
def test_evaluations_are_limited(grid: list[float], at: float, most: int) -> None:
    metric = Metric(peak(at))
    search_scale(metric, grid, max_evaluations=most)
    assert len(metric.calls) <= max(most, len(grid))
    assert set(grid) <= set(metric.calls)


@given(grid=grids, most=st.integers(1, 12), rising=st.booleans(), greater=st.booleans())
def test_what_only_rises_or_falls_is_not_enclosed(
    grid: list[float], most: int, rising: bool, greater: bool
) -> None:
    metric = Metric(lambda scale: scale if rising else -scale)
    found = search_scale(metric, grid, greater_is_better=greater, max_evaluations=most)
    assert not found.inside
    assert found.best == (max if rising == greater else min)(metric.calls)
    assert len(metric.calls) == max(most, len(grid))


def test_the_grid_widens_by_its_own_ratio() -> None:
    up = search_scale(lambda scale: scale, [0.5, 1.0], max_evaluations=5)
    assert list(up.tried) == [0.5, 1.0, 2.0, 4.0, 8.0]
    down = search_scale(lambda scale: -scale, [0.5, 1.0], max_evaluations=5)
    assert list(down.tried) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    alone = search_scale(lambda scale: scale, [1.0], max_evaluations=3)
    assert list(alone.tried) == pytest.approx([1.0, 1.6, 2.56])


@given(grid=grids, at=st.floats(0.01, 50))
def test_the_base_bounds_the_grid_from_below(grid: list[float], at: float) -> None:
    """The merge at scale 0 is worse than the best, and costs nothing."""
    metric = Metric(peak(at))
    found = search_scale(metric, grid, base_value=-1e9, max_evaluations=10_000)
    assert found.inside
    assert found.tried[0.0] == -1e9
    assert 0.0 not in metric.calls
    assert min(metric.calls) == min(grid)


def test_a_base_that_nothing_beats_is_the_best_and_not_enclosed() -> None:
    found = search_scale(lambda scale: -scale, [0.5, 1.0], base_value=0.0, max_evaluations=6)
    assert (found.best, found.value, found.inside) == (0.0, 0.0, False)
    assert min(scale for scale in found.tried if scale > 0) == pytest.approx(0.5 / 2**4)


def test_a_scale_is_preferred_to_an_equal_base() -> None:
    found = search_scale(lambda scale: 1.0 if scale < 0.7 else 0.0, [0.3, 0.5, 1.0], base_value=1.0)
    assert found.best == 0.3
    assert found.inside


def test_the_middle_of_equal_values_is_taken() -> None:
    values = {0.25: 0.0, 0.5: 1.0, 1.0: 1.0, 2.0: 1.0, 4.0: 0.0}
    found = search_scale(values.__getitem__, list(values))
    assert (found.best, found.inside) == (1.0, True)
    found = search_scale({**values, 4.0: 1.0, 8.0: 0.0}.__getitem__, [*values, 8.0])
    assert found.best == 1.0


@given(grid=grids, most=st.integers(1, 12), base=st.sampled_from([None, 0.5]))
def test_a_plateau_to_the_edge_is_not_enclosed(grid: list[float], most: int, base: float | None) -> None:
    """Equal values say nothing about what lies beyond, above all while a task vector is short."""
    metric = Metric(lambda scale: 0.5)
    found = search_scale(metric, grid, base_value=base, max_evaluations=most)
    assert not found.inside
    assert len(metric.calls) == max(most, len(grid))


def test_a_rise_behind_a_plateau_is_found() -> None:
    found = search_scale(lambda s: 0.9 if 3 < s < 5 else 0.2 if s > 5 else 0.5, [0.5, 1.0], base_value=0.5)
    assert (found.best, found.value, found.inside) == (4.0, 0.9, True)


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_values_are_worse_than_any(greater: bool, value: float) -> None:
    found = search_scale(
        lambda scale: value if scale > 2 else -scale if not greater else scale,
        [0.5, 1.0, 2.0],
        greater_is_better=greater,
    )
    assert (found.best, found.inside) == (2.0, True)


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("broken", list(itertools.combinations([0.5, 1.0, 2.0], 2)))
def test_nan_is_the_worst_value(greater: bool, broken: tuple[float, ...]) -> None:
    found = search_scale(
        lambda scale: math.nan if scale in broken or scale > 3 or scale < 0.3 else 1.0,
        [0.5, 1.0, 2.0],
        greater_is_better=greater,
    )
    (best,) = {0.5, 1.0, 2.0} - set(broken)
    assert found.value == 1.0
    assert found.best == best or found.tried[found.best] == 1.0
    nothing = search_scale(lambda scale: math.nan, [0.5, 1.0], greater_is_better=greater)
    assert math.isnan(nothing.value)
    assert not nothing.inside


@pytest.mark.parametrize("scales", [[], [0.0], [-1.0, 1.0], [math.inf], [math.nan]])
def test_scales_must_be_positive_and_finite(scales: list[float]) -> None:
    with pytest.raises(OptionError, match="`scales` must be positive"):
        check_scales(scales)
    with pytest.raises(OptionError, match="`scales` must be positive"):
        search_scale(lambda scale: pytest.fail("nothing must be evaluated"), scales)


def test_scales_are_sorted_and_distinct() -> None:
    assert check_scales([2, 0.5, 2.0, 1]) == [0.5, 1.0, 2.0]
