"""How well a cheap metric predicts merged quality: rank correlation over runs, with an interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergeready.errors import OptionError

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a metric ranks outcomes.

    Attributes:
        correlation: Spearman's ρ; NaN where either side is constant or fewer than three rows are known.
        low: Lower end of its 95 % bootstrap interval; NaN where ρ is.
        high: Upper end.
        n: Rows that had both numbers.
        groups: Independent groups among them, which is what the interval's width depends on.
    """

    correlation: float
    low: float
    high: float
    n: int
    groups: int


def how_well_predicts(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    outcome: str = "retention",
    group: str | None = None,
    seed: int = 0,
) -> dict[str, Prediction]:
    """Spearman's rank correlation of each metric with an outcome, with percentile bootstrap intervals.

    Rows of one training run, or of merges that share experts, are not independent: name what they share with
    ``group``, and whole groups are drawn. Rows without a finite number for a metric or the outcome are left out for
    that metric; ``n`` says how many remained. An interval that contains 0 means: this does not predict anything that
    these data could show.

    Args:
        rows: One mapping a merge, or a merge and task.
        metrics: Keys of the metrics.
        outcome: Key of what shall be predicted.
        group: Key of what makes rows belong together; None where each row is independent.
        seed: Of the draws.

    Raises:
        OptionError: If there are no rows, or a key is in none of them; all such keys are listed.

    Example:
        >>> rows = [{"cosine": c, "retention": 1 - c} for c in (0.1, 0.2, 0.4, 0.8)]
        >>> how_well_predicts(rows, ["cosine"])["cosine"].correlation
        -1.0
    """
    if not rows:
        raise OptionError("there are no rows to learn a correlation from.")
    wanted = [*metrics, outcome, *([group] if group is not None else [])]
    missing = [key for key in dict.fromkeys(wanted) if not any(key in row for row in rows)]
    if missing:
        raise OptionError(f"no row has {', '.join(missing)}; they have {', '.join(rows[0])}.")
    return {metric: _predict(rows, metric, outcome, group, seed) for metric in metrics}


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's ρ, ties by mean ranks; NaN where either is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
    0.5
    """
    return float(_spearman_of_draws(first, second, np.ones((1, len(first))))[0])


def _predict(
    rows: Sequence[Mapping[str, Any]], metric: str, outcome: str, group: str | None, seed: int
) -> Prediction:
    kept = [row for row in rows if _is_number(row.get(metric)) and _is_number(row.get(outcome))]
    members: dict[Hashable, list[int]] = {}
    for index, row in enumerate(kept):
        members.setdefault(row.get(group) if group is not None else index, []).append(index)
    x, y = (np.array([float(row[key]) for row in kept]) for key in (metric, outcome))
    value = spearman(x, y) if len(kept) >= 3 else math.nan
    low = high = math.nan
    if not math.isnan(value) and len(members) > 1:
        belongs = np.zeros((len(members), len(kept)))
        for number, indices in enumerate(members.values()):
            belongs[number, indices] = 1
        often = np.random.default_rng(seed).multinomial(
            len(members), [1 / len(members)] * len(members), RESAMPLES
        )
        draws = _spearman_of_draws(x, y, often @ belongs)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(draws[~np.isnan(draws)], [tail, 1 - tail])
    return Prediction(correlation=value, low=float(low), high=float(high), n=len(kept), groups=len(members))


def _spearman_of_draws(
    first: NDArray[np.float64], second: NDArray[np.float64], often: NDArray[np.float64]
) -> NDArray[np.float64]:
    """ρ of each draw; ``often`` says how many times each row is in it, (draws, rows)."""
    size = often.sum(1, keepdims=True)
    centred = []
    for values in (first, second):
        ranks = _ranks(values, often)
        centred.append(ranks - (often * ranks).sum(1, keepdims=True) / size)
    a, b = centred
    with np.errstate(invalid="ignore"):  # a constant has no correlation
        together: NDArray[np.float64] = (often * a * b).sum(1) / np.sqrt(
            (often * a * a).sum(1) * (often * b * b).sum(1)
        )
    return together


def _ranks(values: NDArray[np.float64], often: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean rank of each row's value within each draw."""
    distinct, place = np.unique(values, return_inverse=True)
    counts = often @ np.eye(len(distinct))[place]
    ranks: NDArray[np.float64] = (counts.cumsum(1) - (counts - 1) / 2)[:, place]
    return ranks


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
