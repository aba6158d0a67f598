from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics.prediction import how_well_predicts, spearman

numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30)


@given(pairs=numbers)
def test_spearman_equals_pandas(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    expected = pd.DataFrame({"x": x, "y": y}).corr(method="spearman").loc["x", "y"]
    assert spearman(x, y) == pytest.approx(expected, nan_ok=True, abs=1e-12)


@given(order=st.permutations(range(8)))
def test_without_ties_it_is_the_sum_of_squared_rank_differences(order: list[int]) -> None:
    rows = [{"metric": float(x), "retention": float(y)} for x, y in enumerate(order)]
    squares = sum((x - y) ** 2 for x, y in enumerate(order))
    found = how_well_predicts(rows, ["metric"])["metric"]
    assert found.correlation == pytest.approx(1 - 6 * squares / (8 * 63))
    assert found.n == found.groups == 8


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Pearson's r of Gaussians gives Spearman's ρ = 6/π · arcsin(r/2)."""
    generator = np.random.default_rng(0)
    truth = 6 / math.pi * math.asin(0.6 / 2)
    hits = 0
    for seed in range(60):
        x = generator.normal(size=60)
        y = 0.6 * x + 0.8 * generator.normal(size=60)
        rows = [{"metric": a, "retention": b} for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        found = how_well_predicts(rows, ["metric"], seed=seed)["metric"]
        assert found.low <= found.correlation <= found.high
        hits += found.low <= truth <= found.high
    assert hits >= 50


def test_groups_are_drawn_whole() -> None:
    """Rows that repeat a run say nothing new: the interval must not shrink."""
    generator = np.random.default_rng(1)
    rows = [
        {"metric": float(x), "retention": float(x + 2 * generator.normal()), "run": i}
        for i, x in enumerate(generator.normal(size=12))
    ]
    once = how_well_predicts(rows, ["metric"], group="run")["metric"]
    often = how_well_predicts(rows * 20, ["metric"], group="run")["metric"]
    fooled = how_well_predicts(rows * 20, ["metric"])["metric"]
    assert (often.n, often.groups) == (240, 12)
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))
    assert fooled.high - fooled.low < (often.high - often.low) / 2


def test_rows_without_a_number_are_left_out_and_counted() -> None:
    rows = [{"metric": float(i), "retention": float(i)} for i in range(5)]
    rows += [{"metric": math.nan, "retention": 9.0}, {"metric": None, "retention": 0.0}, {"retention": 1.0}]
    found = how_well_predicts(rows, ["metric"])["metric"]
    assert (found.correlation, found.n) == (1.0, 5)


def test_numbers_of_numpy_are_numbers() -> None:
    rows = [{"metric": np.float32(i), "retention": np.int64(-i), "odd": np.bool_(i)} for i in range(5)]
    found = how_well_predicts(rows, ["metric", "odd"])
    assert (found["metric"].correlation, found["metric"].n) == (-1.0, 5)
    assert found["odd"].n == 0


def test_what_cannot_be_known_is_not_a_number() -> None:
    constant = [{"metric": 1.0, "retention": float(i)} for i in range(9)]
    assert math.isnan(how_well_predicts(constant, ["metric"])["metric"].correlation)
    two = [{"metric": float(i), "retention": float(i)} for i in range(2)]
    assert math.isnan(how_well_predicts(two, ["metric"])["metric"].correlation)
    one_group = [{"metric": float(i), "retention": float(i), "run": 0} for i in range(9)]
    assert math.isnan(how_well_predicts(one_group, ["metric"], group="run")["metric"].low)


def test_keys_are_checked_all_at_once() -> None:
    with pytest.raises(OptionError, match="no row has cosnie, nai; they have cosine, retention"):
        how_well_predicts([{"cosine": 1.0, "retention": 0.5}], ["cosine", "cosnie"], outcome="nai")
    with pytest.raises(OptionError, match="there are no rows"):
        how_well_predicts([], ["cosine"])
