"""A tiny classification task and Trainers on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.models import tiny_bert


class Tokens(Dataset[dict[str, Tensor]]):
    """Does the first token have a high number? A rule that a tiny model can learn."""

    def __init__(self, count: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, 64, (count, 12), generator=generator)
        self.labels = (self.ids[:, 0] > 32).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def right_or_wrong(seed: int = 1, count: int = 24) -> Any:
    """An evaluation that gives one number an example, and disturbs every random state on the way."""
    data = Tokens(count, seed)

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        torch.rand(3)
        np.random.rand(3)
        batch = {k: v for k, v in data[range(len(data))].items() if k != "labels"}
        return {"accuracy": (model(**batch).logits.argmax(1) == data.labels).float()}

    return evaluate


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**(settings | changes))


def make_trainer(folder: Path, *callbacks: Any, model: nn.Module | None = None, **changes: Any) -> Trainer:
    return Trainer(
        model or tiny_bert(),
        arguments(folder, **changes),
        train_dataset=Tokens(),
        eval_dataset=Tokens(24, seed=1),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
