"""A ready suite: your encoder on your text classification datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergeready.errors import FormatError, OptionError, listing
from mergeready.study.suite import StudySuite, StudyTask

_BATCH = 64
Row = tuple[list[int], int]
"""Token ids and class."""


def suite(
    seed: int,
    model: str,
    datasets: Mapping[str, str],
    text: str = "text",
    label: str = "label",
    max_tokens: int = 128,
    train: int = 1000,
    validation: int = 200,
    test: int = 500,
) -> StudySuite:
    """Text classification with one shared encoder: heads are fitted on the base's features and frozen.

    Each task's head is a logistic regression on the unit-length mean of the base's last hidden states, so that experts
    differ from the base in the encoder alone, which is what merging merges. For a study file::

        suite:
          target: mergeready.study.text_classification:suite
          arguments: {model: org/encoder, datasets: {mails: data/mails, news: org/news}}

    Args:
        seed: Chooses the examples, and splits off what a dataset lacks.
        model: Folder or hub id of an encoder for ``AutoModel``.
        datasets: Task name to a dataset: a folder of ``save_to_disk``, a folder of CSV, JSON or Parquet files, or a
            hub id. Without a ``validation`` or ``test`` split, a fifth of ``train`` becomes one.
        text: Column with texts.
        label: Column with classes.
        max_tokens: Longest text.
        train: Training examples a task, at most.
        validation: Validation examples a task, at most.
        test: Test examples a task, at most.

    Raises:
        FormatError: If a dataset lacks a column, or has a single class.
        OptionError: If no dataset was given, or one cannot be loaded.
    """
    if not datasets:
        raise OptionError("`datasets` is empty: name at least two, as {task: folder or hub id}.")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    base = _encoder(model).eval()
    sizes = {"train": train, "validation": validation, "test": test}
    tasks = {}
    for name, place in datasets.items():
        splits = _splits(name, place, seed)
        _require_columns(name, splits["train"].column_names, text, label)
        classes = sorted({value for part in splits.values() for value in part[label]}, key=str)
        if len(classes) < 2:
            raise FormatError(f"the dataset {name} ({place}) has {len(classes)} class in column {label!r}.")
        rows = {}
        for split, size in sizes.items():
            part = splits[split].shuffle(seed=seed).select(range(min(size, len(splits[split]))))
            ids = tokenizer(list(part[text]), truncation=True, max_length=max_tokens)["input_ids"]
            rows[split] = list(zip(ids, map(classes.index, part[label]), strict=True))
        head = _fitted_head(base, rows["train"], len(classes))
        tasks[name] = StudyTask(
            train=rows["train"],
            collate=_collate,
            loss=partial(_loss, head),
            validation=_accuracy(head, rows["validation"]),
            test=_accuracy(head, rows["test"]),
        )
    return StudySuite(model=partial(_encoder, model), tasks=tasks)


def _encoder(model: str) -> nn.Module:
    from transformers import AutoModel

    loaded: nn.Module = AutoModel.from_pretrained(model)
    return loaded


def _splits(name: str, place: str, seed: int) -> dict[str, Any]:
    from mergeready.transformers.splits import read_splits

    splits = read_splits(place, f"`datasets.{name}`")
    if "train" not in splits:
        raise FormatError(f"the dataset {name} ({place}) has no split `train`, only {listing(splits)}.")
    for split in ("test", "validation"):
        if split not in splits:
            parts = splits["train"].train_test_split(test_size=0.2, seed=seed)
            splits["train"], splits[split] = parts["train"], parts["test"]
    return splits


def _require_columns(name: str, columns: Sequence[str], *wanted: str) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise FormatError(f"the dataset {name} has no column {listing(missing)}, only {listing(columns)}.")


def _collate(rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in rows])


def _features(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    tokens = {name: value.to(device) for name, value in tokens.items()}
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def _parts(rows: Sequence[Row]) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


def _fitted_head(base: nn.Module, rows: Sequence[Row], classes: int) -> nn.Linear:
    """Logistic regression on the base's features, with a weak pull towards zero."""
    with torch.no_grad():
        batches = [_collate([rows[index] for index in part]) for part in _parts(rows)]
        features = torch.cat([_features(base, tokens) for tokens, _ in batches]).double()
    labels = torch.cat([labels for _, labels in batches])
    head = nn.Linear(features.shape[1], classes).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(head(features), labels) + 5e-4 * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return head.float().requires_grad_(False)


def _loss(head: nn.Linear, model: nn.Module, batch: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
    logits = head(_features(model, batch[0]))
    return functional.cross_entropy(logits, batch[1].to(logits.device))


def _accuracy(head: nn.Linear, rows: Sequence[Row]) -> Callable[[nn.Module], dict[str, Tensor]]:
    batches = [(part, _collate([rows[index] for index in part])) for part in _parts(rows)]

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        right = torch.zeros(len(rows))
        for part, (tokens, labels) in batches:
            right[part] = (head(_features(model, tokens)).argmax(dim=1).cpu() == labels).float()
        return {"accuracy": right}

    return evaluate
