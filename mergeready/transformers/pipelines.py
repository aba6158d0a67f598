"""Evaluations from a folder of examples and a transformers pipeline, for those who have no code to point at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, pipeline

from mergeready.errors import OptionError, listing
from mergeready.transformers.folders import load_tokenizer, model_folder
from mergeready.transformers.splits import read_splits
from mergeready.validation.evaluation import Evaluation

TEXT, LABEL = "text", "label"
"""Columns of the examples."""

_BATCH = 32
_HELD_OUT = ("test", "validation")


def text_classification(expert: str | Path, base: str | Path, data: str | Path) -> Evaluation:
    """Accuracy by example of the pipeline ``text-classification`` on held-out examples.

    The model and its head are those of the expert's folder, or the base's where the expert is an adapter; checks then
    put the weights of base, expert and merges into it. The tokenizer is the expert's, if it has one. No code of either
    folder is run and no pickle opened.

    Args:
        expert: Folder or hub id of the expert.
        base: Folder or hub id of its base.
        data: A folder that ``datasets`` reads: saved by ``save_to_disk``, or of csv, json or parquet files. Its split
            is ``test``, else ``validation``, else the only one. Column ``text`` holds texts, ``label`` the class: its
            name, or its number in the model's configuration.

    Raises:
        OptionError: If there are no such examples, the model has no trained classifier, or does not know a label.
    """
    model = _classifier(model_folder(expert, base))
    examples = _held_out(Path(data))
    labels = _class_names(examples, model.config.id2label, data)
    tokenizer = load_tokenizer(expert, base)
    return Evaluation(model=model, own=_Accuracy(model, tokenizer, list(examples[TEXT]), labels))


class _Accuracy:
    def __init__(self, model: nn.Module, tokenizer: Any, texts: list[str], labels: list[str]) -> None:
        self._pipeline = pipeline("text-classification", model=model, tokenizer=tokenizer)
        self._texts, self._labels = texts, labels

    def __call__(self, model: nn.Module) -> Mapping[str, Tensor]:
        """1 for each right answer, 0 for each wrong one."""
        self._pipeline.model = model
        answers = self._pipeline(self._texts, batch_size=_BATCH, truncation=True)
        pairs = zip(answers, self._labels, strict=True)
        return {"accuracy": torch.tensor([float(answer["label"] == label) for answer, label in pairs])}


def _classifier(folder: Path) -> Any:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder} does not load as a text classifier: {error}") from error
    if info["missing_keys"]:
        raise OptionError(
            f"{folder} holds no trained classifier: it lacks {listing(sorted(info['missing_keys']))}. An adapter needs "
            "a base with its head; otherwise pass an evaluation of your own with --eval."
        )
    if model.config.num_labels < 2:
        raise OptionError(f"{folder} is a regression model. Pass an evaluation of your own with --eval.")
    return model.eval()


def _held_out(folder: Path) -> Dataset:
    if not folder.is_dir():
        raise OptionError(f"{folder} is no folder. Name one that holds held-out examples.")
    splits = read_splits(str(folder), "the evaluation")
    names = [*(name for name in _HELD_OUT if name in splits), *(splits if len(splits) == 1 else ())]
    if not names:
        raise OptionError(f"{folder} has neither of {listing(_HELD_OUT)}, but {listing(splits)}.")
    found = splits[names[0]]
    missing = [name for name in (TEXT, LABEL) if name not in found.column_names]
    if missing or not len(found):
        lacks = (
            f"no column {listing(missing)}, but {listing(found.column_names)}" if missing else "no examples"
        )
        raise OptionError(f"{folder} has {lacks}.")
    return found


def _class_names(examples: Dataset, names: Mapping[int, str], data: str | Path) -> list[str]:
    """The name that the pipeline gives to each example's class."""
    feature, values = examples.features[LABEL], list(examples[LABEL])
    if isinstance(feature, ClassLabel) and set(feature.names) <= set(names.values()):
        values = [value if value is None or value < 0 else feature.names[value] for value in values]
    known: dict[int | str, str] = dict(names.items())
    known |= {name: name for name in names.values()}
    unknown = sorted({repr(value) for value in values if value not in known})
    if unknown:
        raise OptionError(
            f"{data} has labels that the model does not know: {listing(unknown)}. It knows {listing(names.values())}, "
            f"by number from 0 to {len(names) - 1}."
        )
    return [known[value] for value in values]
