"""What a matrix of pairs says about whole sets of experts: groups of similar ones, and partners for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergeready.errors import OptionError

LEAST_COSINE = 0.2
"""Average cosine below which two groups stay apart."""


@dataclass(frozen=True)
class Groups:
    """Experts in groups.

    Attributes:
        group: The group of each expert; groups are numbered from 1, the largest first.
        order: The experts so that similar ones stand side by side.
    """

    group: list[int]
    order: list[int]

    def members(self) -> list[list[int]]:
        """The experts of each group, in the order of ``order``."""
        return [[i for i in self.order if self.group[i] == g] for g in range(1, max(self.group) + 1)]


def groups(cosine: ArrayLike, *, least: float = LEAST_COSINE) -> Groups:
    """Group experts by average linkage of the distance 1 − cosine (Sokal & Michener, 1958), as SciPy computes it.

    Two groups become one while the average cosine of their pairs is at least ``least``. Time and memory are
    quadratic in the number n of experts: 12 n² bytes.

    Args:
        cosine: Cosine by pair, shape (n, n), symmetric; n at least 2. NaN, of an expert that equals its base, is unlike
            anything.
        least: Average cosine, −1 to 1.

    Raises:
        OptionError: If ``least`` is outside, or the matrix is not square.

    >>> groups([[1, 0.9, 0], [0.9, 1, 0.1], [0, 0.1, 1]])
    Groups(group=[1, 1, 2], order=[2, 0, 1])
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    values: NDArray[np.float32] = np.asarray(cosine, dtype=np.float32)
    if not -1 <= least <= 1:
        raise OptionError(f"`least` must be a cosine, -1 to 1, not {least}.")
    if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
        raise OptionError(f"`cosine` must be a square matrix of at least two experts, not {values.shape}.")
    distance = np.nan_to_num(1 - values, nan=2.0).clip(min=0)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    found = fcluster(tree, 1 - least, "distance")
    sizes = np.bincount(found)
    # The largest group first, and of equal ones the one with the earlier expert.
    ranked = sorted(set(found.tolist()), key=lambda g: (-sizes[g], int(np.argmax(found == g))))
    number = {g: place for place, g in enumerate(ranked, start=1)}
    return Groups([number[g] for g in found.tolist()], leaves_list(tree).tolist())


def most_compatible(
    sign_conflict: ArrayLike, cosine: ArrayLike, index: int, count: int, *, among: Sequence[int] | None = None
) -> list[int]:
    """Partners for one expert, one after the other: each conflicts least, on average, with all that were chosen before.

    Choosing the nearest ones alone would ignore what they do to each other. Pairs that share no coordinate do not
    conflict; ties go to the larger cosine with the first expert, then to the earlier expert. A diagnostic: sign
    conflicts predict merged quality badly.

    Args:
        sign_conflict: Share of conflicting signs by pair, shape (n, n); NaN where two share no coordinate.
        cosine: Cosine by pair.
        index: The expert that partners are looked for.
        count: How many partners; all others if there are fewer.
        among: Who may be chosen; everybody by default.

    Raises:
        OptionError: If there is no such expert, or ``count`` is not positive.

    >>> conflict = [[0, 0.1, 0.2, 0.3], [0.1, 0, 0.9, 0.3], [0.2, 0.9, 0, 0.3], [0.3, 0.3, 0.3, 0]]
    >>> most_compatible(conflict, [[0] * 4] * 4, index=0, count=2)
    [1, 3]
    """
    conflict = np.nan_to_num(np.asarray(sign_conflict, dtype=np.float64), nan=0.0)
    similar: NDArray[np.float64] = np.asarray(cosine, dtype=np.float64)
    if not 0 <= index < len(conflict):
        raise OptionError(f"`index` must be one of the {len(conflict)} experts, not {index}.")
    if count < 1:
        raise OptionError(f"`count` must be at least 1, not {count}.")
    left = sorted(set(range(len(conflict)) if among is None else among) - {index})
    total = conflict[index].copy()
    chosen: list[int] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda other: (total[other], -similar[index, other], other))
        chosen.append(best)
        left.remove(best)
        total += conflict[best]
    return chosen
