"""What experts and merges know of easy, hard and mislabelled examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergeready.errors import OptionError, listing
from mergeready.merging.evaluation import Score
from mergeready.training.bootstrap import estimate
from mergeready.training.records import Estimate


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """One group of examples before and after merging.

    Attributes:
        n: How many there are.
        lowest: Smallest difficulty among them.
        highest: Largest.
        expert: The expert's accuracy.
        merged: The merge's accuracy.
        forgotten: Of those that the expert gets right, the share that the merge gets wrong; None where the expert
            gets none right.
        gained: Of those that the expert gets wrong, the share that the merge gets right; None where it gets none
            wrong.
    """

    n: int
    lowest: float
    highest: float
    expert: Estimate
    merged: Estimate
    forgotten: Estimate | None
    gained: Estimate | None


def forgetting_by_difficulty(
    expert: ArrayLike, merged: ArrayLike, difficulty: ArrayLike, *, groups: int = 10, seed: int = 0
) -> list[Forgetting]:
    """What merging makes an expert forget, by decile of difficulty, the easiest first.

    Equal numbers of examples a group, up to one; ties are divided by position. Take the difficulty from a model that
    was not trained on the examples, or the groups are those that the expert learned late by construction.

    Args:
        expert: 1 or 0 for right or wrong, an example, by the expert.
        merged: The same by the merge.
        difficulty: One number an example; greater is harder.
        groups: How many, at least 1: 10 for deciles.
        seed: Of the bootstrap intervals.

    Raises:
        OptionError: If lengths differ, there are fewer examples than groups, answers are not 0 or 1, or difficulty is
            NaN.

    Example:
        >>> found = forgetting_by_difficulty([1, 1, 1, 0], [1, 1, 0, 1], [0.1, 0.2, 0.8, 0.9], groups=2)
        >>> [(group.expert.value, group.merged.value, group.forgotten.value) for group in found]
        [(1.0, 1.0, 0.0), (0.5, 0.5, 1.0)]
    """
    before, after = _answers("expert", expert), _answers("merged", merged)
    hard = _difficulty(difficulty)
    if not len(before) == len(after) == len(hard):
        raise OptionError(
            f"{len(before)}, {len(after)} and {len(hard)} numbers are not of the same examples."
        )
    if not 1 <= groups <= len(hard):
        raise OptionError(f"`groups` must be from 1 to the number of examples, {len(hard)}, not {groups}.")
    parts = np.array_split(np.argsort(hard, kind="stable"), groups)
    return [
        Forgetting(
            n=len(part),
            lowest=float(hard[part[0]]),
            highest=float(hard[part[-1]]),
            expert=_mean(before[part], seed),
            merged=_mean(after[part], seed),
            forgotten=_share(1 - after[part][before[part] == 1], seed),
            gained=_share(after[part][before[part] == 0], seed),
        )
        for part in parts
    ]


def accuracy_by_subset(
    right: ArrayLike, subsets: Mapping[str, ArrayLike], *, seed: int = 0
) -> dict[str, Estimate]:
    """Accuracy on each of some subsets of examples, such as the easy, the hard and the mislabelled, with intervals.

    Args:
        right: 1 or 0 for right or wrong, an example.
        subsets: Positions by name.
        seed: Of the bootstrap intervals.

    Raises:
        OptionError: If answers are not 0 or 1, or a subset is empty or names a position that is not there; all are
            listed.

    Example:
        >>> accuracy_by_subset([1, 1, 0, 0], {"easy": [0, 1], "noisy": [3]})["easy"].value
        1.0
    """
    answers = _answers("right", right)
    places = {name: np.asarray(positions, dtype=np.int64).reshape(-1) for name, positions in subsets.items()}
    bad = [name for name, at in places.items() if not at.size or not 0 <= at.min() <= at.max() < len(answers)]
    if bad:
        raise OptionError(f"the subsets {listing(bad)} are empty or go beyond the {len(answers)} examples.")
    return {name: _mean(answers[at], seed) for name, at in places.items()}


def easy_and_hard(difficulty: ArrayLike, share: float = 0.3) -> dict[str, NDArray[np.int64]]:
    """Positions of the easiest and the hardest examples, a share of all each.

    Raises:
        OptionError: If ``share`` is outside (0, 0.5] or leaves no example, or difficulty is NaN.

    Example:
        >>> {name: at.tolist() for name, at in easy_and_hard([0.9, 0.1, 0.5, 0.2], share=0.25).items()}
        {'easy': [1], 'hard': [0]}
    """
    hard = _difficulty(difficulty)
    order = np.argsort(hard, kind="stable")
    count = math.floor(share * len(order) + 1e-9)
    if not 0 < share <= 0.5 or not count:
        raise OptionError(f"`share` must be in (0, 0.5] and leave an example of {len(order)}, not {share}.")
    return {"easy": np.sort(order[:count]), "hard": np.sort(order[-count:])}


def auc_of_noise(difficulty: ArrayLike, wrong: ArrayLike) -> float:
    """How well difficulty tells mislabelled examples from others: the area under the ROC curve.

    The probability that a mislabelled example is harder than another, ties counted half; 0.5 by chance, 1 if all of
    them are the hardest.

    Args:
        difficulty: One number an example; greater is harder.
        wrong: Positions of the mislabelled ones.

    Raises:
        OptionError: If difficulty is NaN somewhere, a position is not there, or all or none are mislabelled.

    Example:
        >>> auc_of_noise([0.1, 0.9, 0.2, 0.3], wrong=[1])
        1.0
    """
    hard = _difficulty(difficulty)
    places = np.asarray(wrong, dtype=np.int64).reshape(-1)
    if places.size and not 0 <= places.min() <= places.max() < len(hard):
        raise OptionError(f"`wrong` goes beyond the {len(hard)} examples.")
    marked = np.zeros(len(hard), dtype=bool)
    marked[places] = True
    count = int(marked.sum())
    if count in (0, len(hard)):
        raise OptionError("AUC needs both mislabelled and other examples.")
    _, place, sizes = np.unique(hard, return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum() - (sizes - 1) / 2)[place]
    return float((ranks[marked].sum() - count * (count + 1) / 2) / (count * (len(hard) - count)))


def _difficulty(given: ArrayLike) -> NDArray[np.float64]:
    hard = np.asarray(given, dtype=np.float64).reshape(-1)
    if np.isnan(hard).any():
        raise OptionError("`difficulty` is NaN for some examples: leave out those that were never seen.")
    return hard


def _answers(what: str, given: ArrayLike) -> NDArray[np.float64]:
    answers = np.asarray(given, dtype=np.float64).reshape(-1)
    if not np.isin(answers, (0.0, 1.0)).all():
        raise OptionError(f"`{what}` must be 1 or 0 for each example: right or wrong.")
    return answers


def _mean(values: NDArray[np.float64], seed: int) -> Estimate:
    return estimate(Score(float(values.mean()), values), seed=seed)


def _share(values: NDArray[np.float64], seed: int) -> Estimate | None:
    return _mean(values, seed) if len(values) else None
