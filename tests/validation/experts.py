"""Experts on disk, healthy ones and ones with a single thing wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import perturb, tiny_bert, tiny_encoder

CARD = """---
base_model: org/base
license: apache-2.0
---
# Law

Answers questions about law.
"""


def write_base(folder: Path, seed: int = 0) -> Path:
    tiny_bert(seed=seed).save_pretrained(folder)
    return folder


def write_full(folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, amount: float = 0.01) -> Path:
    perturb(tiny_bert(), seed, amount).to(dtype).save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def write_adapter(folder: Path, seed: int = 3, **options: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["query", "value"]} | options
    model = perturb(get_peft_model(tiny_bert(), LoraConfig(**settings)), seed, 0.1)
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/base", revision="0" * 40)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(copy.deepcopy(changes))
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(
        {k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"}
    )


def write_headless_base(folder: Path) -> Path:
    tiny_encoder().save_pretrained(folder)
    return folder
