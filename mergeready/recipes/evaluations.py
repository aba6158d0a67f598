"""Evaluations that recipes have built in: accuracy and loss, example by example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready.recipes.classes import CLASS, Classes

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


class ByExample(ABC):
    """Evaluates a model on encoded examples in batches, one number an example.

    Args:
        data: Encoded examples.
        collate: Makes a batch of some.
        batch_size: Examples a batch.
        precision: Mixed precision of the forward pass, as in training.
    """

    def __init__(self, data: Dataset, collate: Collate, batch_size: int, precision: str = "float32") -> None:
        self._data, self._collate, self._size = data, collate, batch_size
        self._dtype = getattr(torch, precision)

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """The metric by example."""
        device = next(model.parameters()).device
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(self._data), self._size):
            stop = min(start + self._size, len(self._data))
            batch = self._collate([self._data[index] for index in range(start, stop)])
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
                values = self.measure(model, batch)
            for name, value in values.items():
                found.setdefault(name, []).append(value.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    @abstractmethod
    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metric of each example of a batch."""


class ClassMetric(ByExample):
    """Accuracy, or cross-entropy in nats, of a classifier."""

    def __init__(self, metric: str, classes: Classes, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._metric, self._classes = metric, classes

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch.pop(CLASS)
        logits = self._classes.masked(model(**batch).logits.float(), labels)
        if self._metric == "accuracy":
            return {"accuracy": (logits.argmax(1) == labels).float()}
        return {"loss": cross_entropy(logits, labels, reduction="none")}


class TokenMetric(ByExample):
    """Of a language model: the mean loss in nats, or the share of right guesses, over an example's learned tokens."""

    def __init__(self, metric: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._metric = metric

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        learned = labels != -100
        if self._metric == "accuracy":
            values = (logits.argmax(2) == labels).float()
        else:
            values = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        mean = (values * learned).sum(1) / learned.sum(1).clamp(min=1)
        return {self._metric: mean}
