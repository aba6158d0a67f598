"""Norm, cosine and sign conflict estimated from a stratified sample, with the standard error that sampling leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mergeready.metrics.estimates import Estimated

Values = NDArray[np.float64]


class Strata:
    """Samples of several parameters behind each other, each drawn with replacement, or all of it.

    Totals are ``Σ_p N_p/n_p Σ_i``, and their variance ``Σ_p N_p²/n_p s_p²`` (Cochran, "Sampling Techniques", 5.3);
    ratios of totals by linearisation (6.11). A parameter of which every element is sampled adds no error.

    Args:
        numels: Elements of each parameter, at least 1.
        counts: How many of them are sampled.

    Example:
        >>> strata = Strata([2, 1], [2, 1])
        >>> strata.norm(np.array([3.0, 0.0, 4.0]))
        Estimated(value=5.0, error=0.0)
    """

    def __init__(self, numels: Sequence[int], counts: Sequence[int]) -> None:
        numel, self._count = np.array(numels, np.float64), np.array(counts, np.float64)
        weight = numel / self._count
        # What a squared residual adds to a variance; nothing where there is nothing left to be drawn.
        spread = np.where(numel > self._count, weight**2 * self._count / np.maximum(self._count - 1, 1), 0.0)
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        self._weight = np.repeat(weight, counts)
        self._spread, self._spread_each = spread, np.repeat(spread, counts)

    def norm(self, x: Values) -> Estimated:
        """‖x‖ of all elements. A sample that misses the few entries which hold most of it shows too small an error."""
        square = x * x
        total = float(self._weight @ square)
        if not total:
            return Estimated(0.0, 0.0)
        variance = self._variance(float(self._spread_each @ (square * square)), self._by_parameter(square))
        return Estimated(math.sqrt(total), math.sqrt(variance / total) / 2)

    def squared(self, x: Values) -> Values:
        """‖x‖² of each parameter."""
        return self._by_parameter(self._weight * (x * x))

    def _by_parameter(self, values: Values) -> Values:
        sums: Values = np.add.reduceat(values, self._starts, axis=-1)
        return sums

    def _variance(self, squares: float, sums: Values) -> float:
        """Of a total, from ``Σ spread z²`` and the sum of z of each parameter."""
        return max(squares - float(self._spread @ (sums * sums / self._count)), 0.0)


class AgainstPeers:
    """One sample against those of several others at the same places.

    Args:
        strata: Where the places are.
        peers: The others' values, shape (peers, places).
    """

    def __init__(self, strata: Strata, peers: Values) -> None:
        self._strata, self._peers, self._squares = strata, peers, peers * peers
        self._cubes, self._signs = self._squares * peers, np.sign(peers)
        self._present = np.abs(self._signs)
        self._totals = self._squares @ strata._weight
        self._fourth = (self._squares * self._squares) @ strata._spread_each
        self._sums = strata._by_parameter(self._squares)

    def cosines(self, x: Values) -> list[Estimated]:
        """``Σ x y / √(Σ x² Σ y²)`` with each of them, all three estimated; NaN where x or y is zero."""
        strata = self._strata
        square = x * x
        weighted, spread = x * strata._weight, strata._spread_each * square
        own, products = float(strata._weight @ square), self._peers @ weighted
        # The linearised residual is z = a xy − b x² − c y². Its squares need these sums over all places.
        mixed, fourth = self._squares @ spread, float(spread @ square)
        left, right = self._peers @ (spread * x), self._cubes @ (strata._spread_each * x)
        own_sums, sums = strata._by_parameter(square), strata._by_parameter(self._peers * x)
        found = []
        for k, product in enumerate(products):
            scale = math.sqrt(own * self._totals[k])
            if not scale:
                found.append(Estimated(math.nan, math.nan))
                continue
            cosine = float(product) / scale
            a, b, c = 1 / scale, cosine / (2 * own), cosine / (2 * self._totals[k])
            squares = (a * a + 2 * b * c) * mixed[k] + b * b * fourth + c * c * self._fourth[k]
            squares -= 2 * a * (b * left[k] + c * right[k])
            variance = strata._variance(float(squares), a * sums[k] - b * own_sums - c * self._sums[k])
            found.append(Estimated(cosine, math.sqrt(variance)))
        return found

    def sign_conflicts(self, x: Values) -> list[Estimated]:
        """Share of opposite signs among places where both are non-zero; NaN where there are none."""
        strata, signs = self._strata, np.sign(x)
        both = self._present * np.abs(signs)
        conflict = (both - self._signs * signs) / 2
        shared, opposite = both @ strata._weight, conflict @ strata._weight
        both_spread, conflict_spread = both @ strata._spread_each, conflict @ strata._spread_each
        both_sums, conflict_sums = strata._by_parameter(both), strata._by_parameter(conflict)
        found = []
        for k, total in enumerate(shared):
            if not total:
                found.append(Estimated(math.nan, math.nan))
                continue
            value = float(opposite[k] / total)
            # Residuals are conflict − value · both, whose square is (1 − 2 value) conflict + value² both.
            squares = (1 - 2 * value) * conflict_spread[k] + value**2 * both_spread[k]
            variance = strata._variance(float(squares), conflict_sums[k] - value * both_sums[k])
            found.append(Estimated(value, math.sqrt(variance) / float(total)))
        return found
