"""Suites of the published studies: sentence encoders with frozen zero-shot heads on real texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from benchmarks.suites.backbones import minilm_l3, minilm_l6
from benchmarks.suites.heads import pooled, zero_shot_head, zero_shot_logits
from benchmarks.suites.text import TEXT_SUITE, load_text_task
from mergeready.experts.factors import KroneckerFactors
from mergeready.study.suite import StudySuite, StudyTask
from mergeready.training.kronecker import kronecker_factors

BACKBONES: dict[str, Callable[[], Path]] = {"minilm_l6": minilm_l6, "minilm_l3": minilm_l3}
EVALUATION_BATCH = 50
SHARED_EXAMPLES, SHARED_BATCH = 128, 16
"""How many inputs a task lets others look at, and in which batches."""
Row = tuple[list[int], int]
"""Token ids and label."""
Inputs = dict[str, Tensor]
"""Tokens, and the head that reads what the encoder makes of them."""


def text(
    seed: int,
    backbone: str = "minilm_l6",
    train: int = 1000,
    validation: int = 100,
    test: int = 200,
    max_tokens: int = 32,
    label_noise: float = 0.0,
    evaluate_in: str = "float32",
    tasks: Sequence[str] = TEXT_SUITE,
) -> StudySuite:
    """Text tasks on one encoder, embeddings and heads frozen.

    Args:
        seed: Chooses training and validation examples, and which labels are made wrong.
        backbone: ``minilm_l6`` or ``minilm_l3``.
        train: Training examples a task, at most.
        validation: Validation examples a task.
        test: Test examples a task, the same for every seed.
        max_tokens: Longest text.
        label_noise: Share of training labels that are replaced by wrong ones; accuracy on them is reported then.
        evaluate_in: ``float32``, or ``bfloat16`` for autocast, which halves the time of an evaluation.
        tasks: Names of the tasks.
    """
    folder = BACKBONES[backbone]()
    batches: dict[str, list[Inputs]] = {}
    accuracy = partial(_accuracy, autocast=evaluate_in == "bfloat16")
    made = {}
    for name in tasks:
        data = load_text_task(name, train=train, validation=validation, test=test, seed=seed)
        head = _head(folder, data.label_texts)
        rows = _rows(folder, data.train, max_tokens)
        wrong = _with_wrong_labels(rows, len(data.label_texts), label_noise, f"{seed}/{name}")
        noisy = [index for index in range(len(rows)) if wrong[index] != rows[index]]
        clean = [index for index in range(len(rows)) if wrong[index] == rows[index]][: len(noisy)]
        extra = {
            "wrong labels": accuracy(head, [wrong[index] for index in noisy]),
            "their true labels": accuracy(head, [rows[index] for index in noisy]),
            "right labels": accuracy(head, [rows[index] for index in clean]),
        }
        batches[name] = _inputs(rows, head)
        made[name] = StudyTask(
            train=wrong,
            collate=_collate,
            loss=partial(_loss, head),
            validation=accuracy(head, _rows(folder, data.validation, max_tokens)),
            test=accuracy(head, _rows(folder, data.test, max_tokens)),
            extra=extra if noisy else {},
        )
    return StudySuite(model=partial(_encoder, folder), tasks=made, given=_given(folder, batches))


def _given(folder: Path, batches: dict[str, list[Inputs]]) -> dict[str, Callable[[str], Any]]:
    """What techniques ask for: inputs without labels, and the curvature of the base on them."""

    @cache
    def factors(task: str) -> KroneckerFactors:
        return kronecker_factors(_encoder(folder), batches[task], forward=_logits, label=task)

    return {
        "inputs": lambda task: batches[task],
        "inputs_of_others": lambda task: [own for name, own in batches.items() if name != task],
        "factors_of_others": lambda task: [factors(name) for name in batches if name != task],
        "logits": lambda task: _logits,
    }


def _encoder(folder: Path) -> nn.Module:
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    model.embeddings.requires_grad_(False)
    model.pooler.requires_grad_(False)
    return model


@cache
def _head(folder: Path, label_texts: tuple[str, ...]) -> Tensor:
    return zero_shot_head(folder, label_texts)


def _rows(folder: Path, data: tuple[Sequence[str], Sequence[int]], max_tokens: int) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(list(data[0]), truncation=True, max_length=max_tokens)["input_ids"]
    return list(zip(ids, data[1], strict=True))


def _inputs(rows: list[Row], head: Tensor) -> list[Inputs]:
    """Batches of inputs, each with the head of its task, so that one function gives the logits of any."""
    starts = range(0, min(len(rows), SHARED_EXAMPLES) - SHARED_BATCH + 1, SHARED_BATCH)
    return [_collate(rows[start : start + SHARED_BATCH])[0] | {"head": head} for start in starts]


def _logits(model: nn.Module, batch: Inputs) -> Tensor:
    tokens = {name: value for name, value in batch.items() if name != "head"}
    return zero_shot_logits(pooled(model, tokens), batch["head"])


def _with_wrong_labels(rows: list[Row], classes: int, share: float, seed: str) -> list[Row]:
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [
        (ids, (label + rng.randrange(1, classes)) % classes) if index in wrong else (ids, label)
        for index, (ids, label) in enumerate(rows)
    ]


def _collate(rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in rows])


def _loss(head: Tensor, model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    tokens, labels = batch
    return functional.cross_entropy(zero_shot_logits(pooled(model, tokens), head).float(), labels)


def _accuracy(head: Tensor, rows: list[Row], *, autocast: bool) -> Callable[[nn.Module], dict[str, Tensor]]:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    parts = [order[start : start + EVALUATION_BATCH] for start in range(0, len(order), EVALUATION_BATCH)]
    batches = [(part, _collate([rows[index] for index in part])) for part in parts]

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        right = torch.zeros(len(rows))
        for part, (tokens, labels) in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                guesses = zero_shot_logits(pooled(model, tokens), head).argmax(dim=1)
            right[part] = (guesses == labels).float()
        return {"accuracy": right}

    return evaluate
