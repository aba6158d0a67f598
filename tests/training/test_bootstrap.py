from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergeready.merging.evaluation import Score
from mergeready.training import bootstrap
from mergeready.training.bootstrap import RESAMPLES, difference, estimate, retention
from mergeready.training.records import Estimate

Column = NDArray[np.float64]


def score(examples: object) -> Score:
    values = np.asarray(examples, dtype=np.float64)
    return Score(float(values.mean()), values)


def coins(share: float, count: int, seed: int) -> Column:
    return (np.random.default_rng(seed).random(count) < share).astype(np.float64)


def brute_force(statistic: Callable[..., float], *columns: Column, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap, one draw after the other."""
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(columns[0]), size=len(columns[0]))
        draws.append(statistic(*[float(np.mean(column[rows])) for column in columns]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_intervals_cover_the_truth_as_often_as_they_say(share: float) -> None:
    """500 test sets of 120 coins: 95 % of the intervals hold the coin's share (± 3 standard errors of that)."""
    found = [estimate(score(coins(share, 120, seed)), seed=seed) for seed in range(500)]
    covered = np.mean([e.low <= share <= e.high for e in found])
    assert 0.915 <= covered <= 0.98
    widths = [e.high - e.low for e in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (share * (1 - share) / 120) ** 0.5, rel=0.03)


def test_intervals_of_paired_differences_cover_the_truth() -> None:
    """Two models that mostly agree: pairing makes the interval as narrow as their disagreement is rare."""
    covered, widths = [], []
    for seed in range(300):
        first = coins(0.6, 150, seed)
        flips = coins(0.1, 150, 10_000 + seed)
        second = np.abs(first - flips)  # share right: 0.6 - 0.1 · 0.6 + 0.1 · 0.4
        found = difference(score(second), score(first), seed=seed)
        covered.append(found.low <= -0.02 <= found.high)
        widths.append(found.high - found.low)
    assert 0.91 <= np.mean(covered) <= 0.985
    assert np.mean(widths) < 0.5 * 2 * 1.96 * (2 * 0.24 / 150) ** 0.5


@pytest.mark.parametrize("count", [30, 60, 333])
def test_against_brute_force(count: int) -> None:
    base, expert, merged = (coins(share, count, seed) for seed, share in enumerate((0.05, 0.95, 0.7)))
    losses = np.random.default_rng(5).exponential(size=count)

    def check(found: Estimate | None, value: float, interval: tuple[float, float]) -> None:
        assert found is not None
        assert found.value == pytest.approx(value, rel=1e-12)
        assert (found.low, found.high) == pytest.approx(interval, rel=1e-9, abs=1e-12)
        assert found.n == count

    check(estimate(score(losses)), losses.mean(), brute_force(lambda m: m, losses))
    check(estimate(score(losses), seed=3), losses.mean(), brute_force(lambda m: m, losses, seed=3))
    check(
        difference(score(merged), score(expert)),
        merged.mean() - expert.mean(),
        brute_force(lambda a, b: a - b, merged, expert),
    )
    check(
        retention(score(merged), score(base), score(expert)),
        (merged.mean() - base.mean()) / (expert.mean() - base.mean()),
        brute_force(lambda m, b, e: (m - b) / (e - b), merged, base, expert),
    )


def test_retention_of_a_loss() -> None:
    """Where smaller is better, expert − base is negative, and so is merged − base: the ratio is what it was."""
    base, expert, merged = (np.linspace(a, a + 0.1, 40) for a in (2.0, 1.0, 1.25))
    found = retention(score(merged), score(base), score(expert), sign=-1.0)
    assert found is not None
    assert found.value == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx((0.75, 0.75))


def test_retention_without_a_gain_is_not_defined() -> None:
    half = score([0.0, 1.0])
    assert retention(score([1.0, 1.0]), half, score([1.0, 0.0])) is None
    assert retention(Score(0.9), Score(0.5), Score(0.5)) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_expert_that_lost_has_kept_nothing_to_speak_of(sign: float) -> None:
    """A merge that loses as much would be called whole."""
    base, worse = Score(0.5), Score(0.5 - 0.1 * sign)
    assert retention(worse, base, worse, sign=sign) is None
    assert retention(worse, base, worse, sign=-sign) is not None


def test_retention_has_no_interval_where_some_draws_have_no_gain() -> None:
    base, expert, merged = coins(0.5, 50, 0), coins(0.5, 50, 1), coins(0.5, 50, 2)
    expert[0], base[0] = 1.0, 0.0
    found = retention(score(merged), score(base), score(expert))
    assert found is not None
    assert found.value == pytest.approx((merged.mean() - base.mean()) / (expert.mean() - base.mean()))
    assert (found.n, found.low, found.high) == (50, None, None)


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_retention_has_no_interval_where_a_score_has_no_examples(lacking: int) -> None:
    scores = [score([1.0, 1.0, 0.0]), score([0.0, 0.0, 0.0]), score([1.0, 1.0, 1.0])]
    scores[lacking] = Score(scores[lacking].value)
    found = retention(*scores)
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    assert (found.low, found.high) == (None, None)
    assert found.n == (None if lacking == 0 else 3)


def test_scores_of_other_examples_are_not_paired() -> None:
    short, long = score([1.0, 0.0]), score([1.0, 0.0, 0.0])
    assert difference(short, long) == Estimate(value=0.5 - 1 / 3)
    found = retention(long, short, score([1.0, 1.0, 1.0]))
    assert found is not None
    assert (found.n, found.low) == (3, None)


def test_without_examples_there_is_no_interval() -> None:
    assert estimate(Score(0.5)) == Estimate(value=0.5)
    assert difference(Score(0.5), Score(0.25)) == Estimate(value=0.25)
    assert difference(Score(0.5), score([0.0, 1.0])) == Estimate(value=0.0)


def test_equal_examples_have_an_interval_of_no_width() -> None:
    assert estimate(score(np.ones(20))) == Estimate(value=1.0, n=20, low=1.0, high=1.0)
    same = score(coins(0.5, 30, 0))
    assert difference(same, same) == Estimate(value=0.0, n=30, low=0.0, high=0.0)


def test_the_same_scores_give_the_same_interval() -> None:
    losses = np.random.default_rng(5).exponential(size=40)
    assert estimate(score(losses)) == estimate(score(losses))
    assert estimate(score(losses)) != estimate(score(losses), seed=1)


@pytest.mark.parametrize("at_once", [1, 100, 999, 10**9])
def test_drawing_in_pieces_changes_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large test sets are drawn in pieces; the draws are those of one go."""
    scores = [score(coins(share, 37, seed)) for seed, share in enumerate((0.7, 0.1, 0.95))]
    whole = retention(*scores)
    monkeypatch.setattr(bootstrap, "_VALUES_AT_ONCE", at_once)
    assert retention(*scores) == whole


def test_global_random_states_are_not_touched() -> None:
    np.random.seed(3)
    states = [np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()]
    scores = [score(coins(share, 20, seed)) for seed, share in enumerate((0.7, 0.1, 0.95))]
    estimate(scores[0])
    difference(scores[0], scores[1])
    retention(*scores)
    assert [np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()] == states


def test_one_example_has_no_interval() -> None:
    """A mean that an evaluation wraps into an array looks like one: it was certain to the last digit."""
    one, two, zero = score([0.5]), score([0.75]), score([0.0])
    assert estimate(one) == Estimate(value=0.5, n=1)
    assert difference(two, one) == Estimate(value=0.25, n=1)
    assert retention(one, zero, two) == Estimate(value=2 / 3, n=1)
