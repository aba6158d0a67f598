from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.training.difficulty.measures import example_measures
from mergeready.training.difficulty.table import DifficultyTable

Model = TypeVar("Model")
TrainOn: TypeAlias = Callable[[Sequence[int]], Model]
"""Trains a fresh model on the examples at these positions."""
ScoreOn: TypeAlias = Callable[[Model, Sequence[int]], tuple[Tensor, Tensor]]
"""Logits and labels of the examples at these positions, in this order."""


def fold_of(count: int, folds: int, seed: int = 0, strata: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Which fold each of ``count`` examples is in: at random, sizes differing by at most one.

    Args:
        count: How many examples.
        folds: How many folds, from 2 to ``count``.
        seed: Of the draw.
        strata: A class an example; each is spread over all folds.

    Raises:
        OptionError: If a number is out of range.

    Example:
        >>> sorted(fold_of(5, 2).tolist())
        [0, 0, 0, 1, 1]
    """
    if not 2 <= folds <= count:
        raise OptionError(f"`folds` must be from 2 to the number of examples, {count}, not {folds}.")
    if strata is not None and len(strata) != count:
        raise OptionError(f"`strata` has {len(strata)} classes for {count} examples.")
    order = np.random.default_rng(seed).permutation(count)
    if strata is not None:
        order = order[np.argsort(np.asarray(strata)[order], kind="stable")]
    fold = np.empty(count, dtype=np.int64)
    fold[order] = np.arange(count) % folds
    return fold


def cross_fitted_difficulty(
    count: int,
    train: TrainOn[Model],
    score: ScoreOn[Model],
    *,
    folds: int = 2,
    seed: int = 0,
    strata: Sequence[int] | None = None,
) -> DifficultyTable:
    """Difficulty of each example by a model that was not trained on it.

    Measured inside the run that it shall explain, "hard" means "learned late" by construction; out of fold it does
    not. An example is hard here if what the others teach does not tell its label: it is mislabelled, ambiguous, or
    like no other.

    *Cost*: ``folds`` trainings, each on (folds − 1) / folds of the examples, and one evaluation pass over all.

    Args:
        count: How many examples there are; ids are their positions.
        train: Trains a fresh model on examples at some positions.
        score: Logits and labels of examples at some positions, in order.
        folds: How many models, at least 2.
        seed: Of the division.
        strata: A class an example, so that every fold holds some of each.

    Returns:
        Each example seen once: its out-of-fold loss, EL2N, confidence and correctness.

    Raises:
        OptionError: If a number is out of range, or ``score`` returns another number of rows than it was asked for.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> def train(positions):
        ...     return sum(positions)  # any model
        >>> def score(model, positions):
        ...     return torch.zeros(len(positions), 2), labels[list(positions)]
        >>> cross_fitted_difficulty(4, train, score).loss.round(3).tolist()
        [0.693, 0.693, 0.693, 0.693]
    """
    fold = fold_of(count, folds, seed, strata)
    values = {name: np.empty(count) for name in ("loss", "el2n", "confidence")}
    correct = np.empty(count, dtype=bool)
    for number in range(folds):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        model = train(inside.tolist())
        logits, labels = score(model, outside.tolist())
        if len(logits) != len(outside):
            raise OptionError(f"`score` returned {len(logits)} rows for {len(outside)} examples.")
        found = example_measures(logits, labels)
        for name, column in values.items():
            column[outside] = getattr(found, name).double().cpu().numpy()
        correct[outside] = found.correct.to(torch.bool).cpu().numpy()
    return DifficultyTable.of_one_pass(np.arange(count), **values, correct=correct)
