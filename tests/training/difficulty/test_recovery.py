"""A real training on labels of which a fifth is wrong: the wrong ones must come out as the hardest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready import DifficultyTracker, auc_of_noise, cross_fitted_difficulty
from mergeready.training.difficulty.noise import noisy_labels
from mergeready.training.difficulty.observer import ForwardObserver
from tests.training.small import Net, examples

COUNT = 240


def world() -> tuple[Tensor, Tensor, np.ndarray]:
    x, clean = examples(1, 0, COUNT)
    labels, wrong = noisy_labels(clean.tolist(), classes=3, share=0.2, seed=4)
    return x, torch.from_numpy(labels), wrong


def train(
    x: Tensor, y: Tensor, positions: Sequence[int], epochs: int, seen: Callable[[int], None] | None = None
) -> Net:
    model = Net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    step = 0
    for _ in range(epochs):
        order = torch.tensor(positions)[torch.randperm(len(positions), generator=generator)]
        for batch in order.split(32):
            step += 1
            if seen is not None:
                seen(step)
            ids = {} if seen is None else {"example_id": batch, "example_label": y[batch]}
            cross_entropy(model(x=x[batch], **ids), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_by_the_training_s_own_passes(
    record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, wrong = world()
    tracker = DifficultyTracker()
    original = Net.__init__

    def observed(self: Net, seed: int = 0) -> None:
        original(self, seed)
        ForwardObserver(self, tracker)

    monkeypatch.setattr(Net, "__init__", observed)
    train(x, y, range(COUNT), 12, lambda step: setattr(tracker, "step", step))
    table = tracker.table()
    assert table.id.tolist() == list(range(COUNT))
    assert (table.seen == 12).all()
    for name in ("loss", "el2n", "el2n_early"):
        auc = auc_of_noise(getattr(table, name), wrong)
        record_property(f"auc of {name}", auc)
        assert auc > 0.9, name
    assert auc_of_noise(-table.confidence, wrong) > 0.9
    hardest = np.argsort(-table.loss)[: len(wrong)]
    assert len(np.intersect1d(hardest, wrong)) > 0.7 * len(wrong)


def test_by_models_that_did_not_train_on_them(record_property: Callable[[str, object], None]) -> None:
    x, y, wrong = world()

    def score(model: Net, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model.eval()(x[list(positions)]), y[list(positions)]

    table = cross_fitted_difficulty(COUNT, lambda positions: train(x, y, positions, 8), score, folds=3)
    auc = auc_of_noise(table.loss, wrong)
    record_property("auc of out-of-fold loss", auc)
    assert auc > 0.9
