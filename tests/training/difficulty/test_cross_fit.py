from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.training.difficulty.cross_fit import cross_fitted_difficulty, fold_of


@given(count=st.integers(2, 60), folds=st.integers(2, 6), seed=st.integers(0, 9))
def test_folds_are_even(count: int, folds: int, seed: int) -> None:
    if folds > count:
        return
    sizes = np.bincount(fold_of(count, folds, seed), minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    strata = [i % 3 for i in range(count)]
    fold = fold_of(count, folds, seed, strata)
    for kind in range(3):
        parts = np.bincount(fold[[s == kind for s in strata]], minlength=folds)
        assert parts.max() - parts.min() <= 1


class Memory:
    """A model that knows exactly what it was trained on."""

    def __init__(self) -> None:
        self.trained: list[set[int]] = []

    def train(self, positions: Sequence[int]) -> set[int]:
        self.trained.append(set(positions))
        return set(positions)

    def score(self, model: set[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        known = torch.tensor([position in model for position in positions])
        logits = torch.zeros(len(positions), 2)
        logits[:, 0] = torch.where(known, 9.0, 0.0) + torch.tensor(positions) / 1000
        return logits, torch.zeros(len(positions), dtype=torch.long)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_no_example_is_scored_by_a_model_that_saw_it(folds: int) -> None:
    memory = Memory()
    table = cross_fitted_difficulty(17, memory.train, memory.score, folds=folds)
    assert len(memory.trained) == folds
    assert sorted(i for seen in memory.trained for i in range(17) if i not in seen) == list(range(17))
    assert table.loss.min() > 0.6  # a model that had seen it would have a loss near zero
    # Each value is at its own example, though folds are scattered.
    expected = [math.log(1 + math.exp(-i / 1000)) for i in range(17)]
    np.testing.assert_allclose(table.loss, expected, rtol=1e-5)
    assert table.id.tolist() == list(range(17))


def test_arguments_are_checked() -> None:
    memory = Memory()
    with pytest.raises(OptionError, match="`folds` must be from 2 to the number of examples, 3, not 4"):
        cross_fitted_difficulty(3, memory.train, memory.score, folds=4)
    with pytest.raises(OptionError, match="`strata` has 1 classes for 3 examples"):
        fold_of(3, 2, strata=[0])
    with pytest.raises(OptionError, match="`score` returned 1 rows for 2 examples"):
        cross_fitted_difficulty(4, memory.train, lambda m, p: memory.score(m, p[:1]))
