"""Measure what the tables of ``benchmarks/README.md`` say.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.suites.measure demo`` (about ten minutes) or ``... probe`` (two).
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.suites import backbones
from benchmarks.suites.build_demo import DATA_FOLDER
from benchmarks.suites.heads import linear_probe, pooled, zero_shot_head, zero_shot_logits
from benchmarks.suites.images import ImageInput
from benchmarks.suites.text import Texts
from benchmarks.suites.vision import VISION_TASKS, load_vision_task

BATCH_SIZE, MAX_TOKENS, LEARNING_RATE, WARMUP_STEPS, SEED = 32, 32, 1e-4, 10, 0
REPORTED_STEPS = (64, 256)


@dataclass(slots=True)
class _Encoder:
    """A text encoder with its tokenizer and a frozen head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: torch.Tensor

    @classmethod
    def load(cls, folder: Path, label_texts: tuple[str, ...]) -> _Encoder:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        model.embeddings.requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model, tokenizer, zero_shot_head(folder, label_texts))

    def logits(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return zero_shot_logits(pooled(self.model, dict(tokens)), self.head)

    @torch.no_grad()
    def accuracy(self, data: Texts) -> float:
        self.model.eval()
        right = 0
        for start in range(0, len(data[0]), 64):
            predicted = self.logits(list(data[0][start : start + 64])).argmax(dim=1)
            right += int(predicted.eq(torch.tensor(data[1][start : start + 64])).sum())
        return right / len(data[0])


def _fine_tuned(encoder: _Encoder, train: Texts, test: Texts) -> tuple[list[float], float]:
    """Test accuracy at each of ``REPORTED_STEPS``, and CPU seconds a step."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    parameters = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    order: list[int] = []
    accuracies, seconds = [], 0.0
    for step in range(1, REPORTED_STEPS[-1] + 1):
        if len(order) < BATCH_SIZE:
            order = rng.sample(range(len(train[0])), len(train[0]))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        start = time.process_time()
        encoder.model.train()
        logits = encoder.logits([train[0][i] for i in batch])
        loss = functional.cross_entropy(logits, torch.tensor([train[1][i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        warmup.step()
        seconds += time.process_time() - start
        if step in REPORTED_STEPS:
            accuracies.append(encoder.accuracy(test))
    return accuracies, seconds / REPORTED_STEPS[-1]


def _majority(labels: list[int]) -> float:
    return Counter(labels).most_common(1)[0][1] / len(labels)


def demo_row(name: str) -> str:
    """One row of the demo's table."""
    table = pq.read_table(DATA_FOLDER / "suite.parquet").to_pylist()
    facts = json.loads((DATA_FOLDER / "tasks.json").read_text(encoding="utf-8"))[name]

    def split(wanted: str) -> Texts:
        rows = [row for row in table if row["task"] == name and row["split"] == wanted]
        return tuple(row["text"] for row in rows), tuple(row["label"] for row in rows)

    train, test = split("train"), split("test")
    encoder = _Encoder.load(backbones.minilm_l6(), tuple(facts["label_texts"]))
    tokens = [len(ids) for ids in encoder.tokenizer(list(train[0]))["input_ids"]]
    zero_shot = encoder.accuracy(test)
    (early, late), seconds = _fine_tuned(encoder, train, test)
    return (
        f"| {name} | {len(facts['label_names'])} | {_majority(list(test[1])):.3f} | {zero_shot:.3f} | {early:.3f} "
        f"| {late:.3f} | {sum(tokens) / len(tokens):.1f} | {seconds:.2f} |"
    )


@torch.no_grad()
def _features(model: backbones.VisionBackbone, inputs: ImageInput, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.features(inputs.prepare(batch)) for batch in torch.split(images, 64)])


def probe_row(name: str) -> str:
    """Accuracy of a linear probe on each vision backbone."""
    task = load_vision_task(name)
    accuracies = []
    for model, inputs in (
        (backbones.efficientnet_lite0(), backbones.EFFICIENTNET_INPUT),
        (backbones.squeezenet(), backbones.SQUEEZENET_INPUT),
    ):
        head = linear_probe(_features(model, inputs, task.train[0]), task.train[1], len(task.label_names))
        right = head(_features(model, inputs, task.test[0])).argmax(dim=1).eq(task.test[1])
        accuracies.append(f"{right.float().mean():.3f}")
    return f"| {name} | {' / '.join(accuracies)} ({_majority(task.test[1].tolist()):.3f}) |"


def main() -> None:
    """Print the rows of one table."""
    if sys.argv[1:] == ["demo"]:
        for name in json.loads((DATA_FOLDER / "tasks.json").read_text(encoding="utf-8")):
            print(demo_row(name), flush=True)
    elif sys.argv[1:] == ["probe"]:
        for name in VISION_TASKS:
            print(probe_row(name), flush=True)
    else:
        raise SystemExit("usage: python -m benchmarks.suites.measure demo|probe")


if __name__ == "__main__":
    main()
