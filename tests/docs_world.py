"""What the pages of docs/ take for granted: a base, experts, adapters, a model to train and data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from tests.models import perturb, tiny_bert
from tests.trainers import Tokens, accuracy, arguments, right_or_wrong

EXPERTS = ("law", "math", "code")


def make_world(folder: Path) -> dict[str, Any]:
    """Fill a folder, go there, and return the names that a page's code may use."""
    os.chdir(folder)
    tiny_bert().save_pretrained("base")
    for seed, name in enumerate(EXPERTS, start=1):
        perturb(_fresh_model(), seed).save_pretrained(f"experts/{name}")
        _save_adapter(f"adapters/{name}", seed)
    data = Tokens()
    return {
        "model": _fresh_model(),
        "fresh_model": _fresh_model,
        "args": arguments(folder / "run"),
        "train": data,
        "validation": Tokens(24, seed=1),
        "accuracy": accuracy,
        "loader": DataLoader(data, batch_size=8),
        "own_accuracy": right_or_wrong(1),
        "law_accuracy": right_or_wrong(2),
        "math_accuracy": right_or_wrong(3),
        "law_examples": data[range(8)],
    }


def _fresh_model() -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained("base")


def _save_adapter(folder: str, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_fresh_model(), LoraConfig(r=4, target_modules=["query", "value"]))
    perturb(model, seed, scale=0.05).save_pretrained(folder)
