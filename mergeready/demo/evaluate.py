from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeready.demo.encoder import ZeroShotClassifier

_BATCH = 64


class Accuracy:
    """Right or wrong for each example of one task, whatever head the model carries at the moment.

    Args:
        token_ids: Token ids of each text.
        labels: Class of each text.
        head: Label embeddings of the task, shape (classes, hidden).
    """

    def __init__(self, token_ids: Sequence[Sequence[int]], labels: Sequence[int], head: Tensor) -> None:
        self._head, self._labels = head, torch.tensor(labels)
        # Texts of like length share a batch: half the tokens would be padding otherwise.
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        self._batches = [
            (torch.tensor(part), *pad([token_ids[i] for i in part]))
            for part in (order[i : i + _BATCH] for i in range(0, len(order), _BATCH))
        ]

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """``accuracy`` by example, 1.0 or 0.0."""
        if not isinstance(model, ZeroShotClassifier):
            raise TypeError(f"the demo evaluates its own classifier, not {type(model).__name__}")
        right = torch.zeros(len(self._labels))
        for index, ids, mask in self._batches:
            guesses = (model.encode(ids, mask) @ self._head.T).argmax(1)
            right[index] = (guesses == self._labels[index]).float()
        return {"accuracy": right}


def pad(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, each (batch, longest)."""
    longest = max(len(ids) for ids in token_ids)
    ids = torch.zeros(len(token_ids), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(token_ids):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask
