from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergeready.merging.evaluation import Score
from mergeready.training.records import Estimate

RESAMPLES = 1000
_VALUES_AT_ONCE = 2**20
CONFIDENCE = 0.95


def estimate(score: Score, *, seed: int = 0) -> Estimate:
    """A score with its 95 % bootstrap interval over examples, where examples are known."""
    if score.examples is None:
        return Estimate(value=score.value)
    draws = _resample_means(seed, score.examples)[:, 0]
    return _with_interval(score.value, draws, len(score.examples))


def retention(
    merged: Score, base: Score, expert: Score, *, sign: float = 1.0, seed: int = 0
) -> Estimate | None:
    """(merged − base) / (expert − base) with its interval; None where the expert is no better than the base.

    Of an expert that lost, the ratio would call a merge good that loses as well. ``sign`` is −1 where smaller is
    better.

    The three scores are resampled together, example by example, since they were measured on the same examples.
    The interval is left out where some draws put the expert level with the base, as the ratio has none there.
    """
    gain = expert.value - base.value
    if sign * gain < 1e-12:
        return None
    value = (merged.value - base.value) / gain
    columns = [score.examples for score in (merged, base, expert)]
    if any(column is None or len(column) != merged.n for column in columns):
        return Estimate(value=value, n=merged.n)
    means = _resample_means(seed, *[column for column in columns if column is not None])
    gains = means[:, 2] - means[:, 1]
    if np.any(np.sign(gains) != np.sign(gain)):
        return Estimate(value=value, n=merged.n)
    return _with_interval(value, (means[:, 0] - means[:, 1]) / gains, merged.n)


def difference(first: Score, second: Score, *, seed: int = 0) -> Estimate:
    """First − second with its interval; paired where both were measured on the same examples."""
    value = first.value - second.value
    if first.examples is None or second.examples is None or first.n != second.n:
        return Estimate(value=value)
    means = _resample_means(seed, first.examples, second.examples)
    return _with_interval(value, means[:, 0] - means[:, 1], first.n)


def _resample_means(seed: int, *columns: NDArray[np.float64]) -> NDArray[np.float64]:
    stacked = np.stack(columns, axis=1)
    generator = np.random.default_rng(seed)
    rows = max(
        _VALUES_AT_ONCE // stacked.size, 1
    )  # all draws at once would take gigabytes for large test sets
    means = []
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        index = generator.integers(0, len(stacked), size=(count, len(stacked)))
        means.append(stacked[index].mean(axis=1))
    return np.concatenate(means)


def _with_interval(value: float, draws: NDArray[np.float64], n: int | None) -> Estimate:
    if n == 1:  # every draw is the same example, which says nothing of how others would come out
        return Estimate(value=value, n=n)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value=value, n=n, low=float(low), high=float(high))
