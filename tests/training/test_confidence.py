"""Confidence and entropy against sums over probabilities that are known, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeready import confidence
from mergeready.errors import OptionError
from tests.training.small import left_alone

LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0], [0.0, 0.0], [200.0, -200.0]])


class Says(nn.Module):
    """Looks its logits up, and is unsure in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, index: Tensor, **_: Any) -> Tensor:
        return LOGITS[index] * self.scale * (0.1 if self.training else 1.0)


def entropy(*shares: float) -> float:
    return -sum(p * math.log(p) for p in shares)


def test_it_is_the_mean_over_examples_of_batches_of_any_size() -> None:
    found = confidence(Says(), [torch.tensor([0, 1, 2]), torch.tensor([3])])
    assert found.mean == pytest.approx((0.75 + 0.9 + 0.5 + 1.0) / 4, rel=1e-6)
    expected = (entropy(0.25, 0.75) + entropy(0.9, 0.1) + entropy(0.5, 0.5)) / 4
    assert found.entropy == pytest.approx(expected, rel=1e-6)


def test_padding_does_not_count() -> None:
    batch = {"index": torch.tensor([[0, 2], [1, 2]]), "attention_mask": torch.tensor([[1, 0], [1, 0]])}
    assert confidence(Says(), [batch]).mean == pytest.approx((0.75 + 0.9) / 2, rel=1e-6)


def test_the_model_is_left_alone() -> None:
    with left_alone() as model:
        confidence(model, [torch.ones(2, 6)])


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="one output"):
        confidence(nn.Linear(2, 1), [torch.ones(3, 2)])
    with pytest.raises(OptionError, match="is empty"):
        confidence(nn.Linear(2, 2), [])
