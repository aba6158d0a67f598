"""Experts of MiniLM-L6 on the text suite, trained once and kept: one run gives checkpoints on a geometric grid.

The encoder's layers are trained; embeddings and the zero-shot head stay frozen, so experts share everything but what
fine-tuning changed. Checkpoints hold the trained parameters alone and lie in the benchmarks' cache; a run that was
interrupted starts over, a finished one is never trained again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from benchmarks.suites.backbones import minilm_l6
from benchmarks.suites.fetch import cache_folder
from benchmarks.suites.heads import pooled, zero_shot_head, zero_shot_logits
from benchmarks.suites.text import Texts, TextTask, load_text_task
from mergeready.weights.atomic import new_folder

EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """How one expert is trained: AdamW at a constant rate after a linear warm-up."""

    task: str
    seed: int = 0
    checkpoints: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    train_examples: int = 1000
    batch_size: int = 32
    max_tokens: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 10

    @property
    def folder(self) -> Path:
        """Where its checkpoints are kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return cache_folder() / "experts" / f"{self.task}-{self.seed}-{digest}"

    def checkpoint(self, step: int) -> Path:
        """The file with the weights after ``step`` steps."""
        return self.folder / f"step-{step}.safetensors"


@dataclass(frozen=True)
class Batches:
    """Tokenised texts of similar length together, and their labels."""

    tokens: Sequence[dict[str, Tensor]]
    labels: Sequence[Tensor]


@cache
def tokenizer() -> object:
    """The tokenizer of the encoder."""
    return AutoTokenizer.from_pretrained(minilm_l6(), local_files_only=True)


def encoder() -> nn.Module:
    """A fresh copy of the pretrained encoder, embeddings frozen."""
    model = AutoModel.from_pretrained(minilm_l6(), local_files_only=True)
    model.embeddings.requires_grad_(False)
    model.pooler.requires_grad_(False)
    return model


@cache
def head(task: str) -> Tensor:
    """The frozen head of a task."""
    return zero_shot_head(minilm_l6(), load_text_task(task).label_texts)


def encode(texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """Token ids and attention mask of texts, padded to the longest."""
    encoded = tokenizer()(  # type: ignore[operator]
        list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return dict(encoded)


def batches(data: Texts, max_tokens: int) -> Batches:
    """Texts in batches by length, since padding costs as much as text."""
    texts, labels = data
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [order[i : i + EVALUATION_BATCH] for i in range(0, len(order), EVALUATION_BATCH)]
    return Batches(
        [encode([texts[i] for i in part], max_tokens) for part in parts],
        [torch.tensor([labels[i] for i in part]) for part in parts],
    )


def accuracy_on(task: str, data: Texts, max_tokens: int = 32) -> Callable[[nn.Module], dict[str, Tensor]]:
    """An evaluation of a task: 1 or 0 for each example, in order of length."""
    prepared, weights = batches(data, max_tokens), head(task)

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        right = [
            zero_shot_logits(pooled(model, tokens), weights).argmax(dim=1) == labels  # type: ignore[arg-type]
            for tokens, labels in zip(prepared.tokens, prepared.labels, strict=True)
        ]
        return {"accuracy": torch.cat(right).float()}

    return evaluate


def train_expert(spec: ExpertSpec) -> Path:
    """Train an expert unless it was trained before; returns the folder of its checkpoints."""
    if spec.folder.is_dir():
        return spec.folder
    task = load_text_task(spec.task, train=spec.train_examples, seed=spec.seed)
    with new_folder(spec.folder) as folder:
        _train(spec, task, folder)
        (folder / "spec.json").write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")
    return spec.folder


def _train(spec: ExpertSpec, task: TextTask, folder: Path) -> None:
    torch.manual_seed(spec.seed)
    rng = random.Random(spec.seed)
    model, weights = encoder().train(), head(spec.task)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / spec.warmup_steps)
    )
    texts, labels = task.train
    order: list[int] = []
    for step in range(1, max(spec.checkpoints) + 1):
        if len(order) < spec.batch_size:
            order = rng.sample(range(len(texts)), len(texts))
        batch, order = order[: spec.batch_size], order[spec.batch_size :]
        tokens = encode([texts[i] for i in batch], spec.max_tokens)
        logits = zero_shot_logits(pooled(model, tokens), weights)  # type: ignore[arg-type]
        loss = functional.cross_entropy(logits, torch.tensor([labels[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in spec.checkpoints:
            state = {name: p.detach().clone() for name, p in trained.items()}
            save_file(state, folder / f"step-{step}.safetensors", metadata={"format": "pt"})
