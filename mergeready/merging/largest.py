"""Exact order statistics of values that are in memory; ``selection.py`` is for those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALL = 2**13  # values that are looked at all at once
_SAMPLE = 2**12
_SIGMAS = 5.0


def largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Positions of the ``count`` largest values, in rising order; among equal values the first ones. NaN are none.

    A sample brackets the smallest of them; only what lies between the brackets is partitioned.

    >>> largest(np.array([2.0, 5.0, 2.0, 4.0, 2.0]), 3)
    array([0, 1, 3])
    """
    candidates, high = _candidates(values, count)
    among = values.take(candidates)
    if len(among) <= count:
        return candidates
    border = _border(among, count, high)
    chosen = among > border
    missing = count - int(np.count_nonzero(chosen))
    chosen[np.flatnonzero(among == border)[:missing]] = True
    return candidates.take(np.flatnonzero(chosen))


def kth_largest(values: NDArray[Any], count: int) -> Any:
    """The ``count``-th largest of the values that are not NaN; NaN where there are not so many.

    >>> float(kth_largest(np.array([2.0, 5.0, 4.0]), 2))
    4.0
    """
    candidates, high = _candidates(values, count)
    if len(candidates) < count:
        return values.dtype.type(np.nan)
    return _border(values.take(candidates), count, high)


def border(values: NDArray[Any], count: int) -> tuple[int, int]:
    """Of integers, the ``count``-th largest value and the position of the last one of it that is among the largest.

    >>> border(np.array([2, 5, 2, 4, 2]), 3)
    (2, 0)
    """
    candidates, high = _candidates(values, count)
    among = values.take(candidates)
    value = _border(among, count, high)
    missing = count - int(np.count_nonzero(among > value))
    return int(value), int(candidates[np.flatnonzero(among == value)[missing - 1]])


def _border(among: NDArray[Any], count: int, high: Any) -> Any:
    """The ``count``-th largest, which lies at or below ``high`` unless the sample misled."""
    below = among.take(np.flatnonzero(among <= high))
    left = count - (len(among) - len(below))
    if not 0 < left <= len(below):
        below, left = among, count
    return np.partition(below, len(below) - left)[len(below) - left]


def _candidates(values: NDArray[Any], count: int) -> tuple[NDArray[np.int64], Any]:
    """Positions among which the largest lie, and a value that the smallest of them hardly exceeds.

    By a sample; by all values if there are few or the sample misled.
    """
    if len(values) > _SMALL:
        sample = np.sort(values[:: len(values) // _SAMPLE | 1])[::-1]
        share = count / len(values)
        margin = _SIGMAS * (share * (1 - share) / len(sample)) ** 0.5 + 1 / len(sample)
        last, first = int((share + margin) * len(sample)) + 1, int((share - margin) * len(sample))
        if last < len(sample):
            above = np.flatnonzero(values >= sample[last])
            if len(above) >= count:
                return above, sample[first] if first > 0 else np.inf
    return np.flatnonzero(~np.isnan(values)), np.inf
