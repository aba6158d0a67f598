"""Classes as numbers: one task's, or several tasks' beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready.errors import OptionError, listing
from mergeready.recipes.load_data import chosen, read_data, require_columns
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.sources import Split

CLASS = "labels"


@dataclass(frozen=True)
class Classes:
    """The classes of a run.

    Attributes:
        names: A name for each class.
        groups: The task of each class, by number. Only classes of an example's own task compete for it.
        tasks: Names of the tasks; one without a name where nothing is joined.
    """

    names: tuple[str, ...]
    groups: tuple[int, ...]
    tasks: tuple[str, ...]

    @property
    def plain(self) -> tuple[str, ...]:
        """A name for each class, without the task's.

        >>> Classes(("x: cat", "y: x: dog"), (0, 1), ("x", "y")).plain
        ('cat', 'x: dog')
        """
        named = zip(self.names, self.groups, strict=True)
        return tuple(name.removeprefix(f"{self.tasks[group]}: ") for name, group in named)

    def masked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits in which classes of other tasks are out of reach, shape (batch, classes).

        >>> classes = Classes(("a", "b", "c"), (0, 0, 1), ("x", "y"))
        >>> classes.masked(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([0])).argmax().item()
        1
        """
        if len(self.tasks) == 1:
            return logits
        groups = torch.tensor(self.groups, device=logits.device)
        return logits.masked_fill(groups[labels].unsqueeze(1) != groups, float("-inf"))

    def loss(self) -> Callable[..., Tensor]:
        """A loss for the Trainer: summed over examples and divided by how many the whole step has.

        A mean over each forward pass would be scaled wrongly: transformers takes classifiers that accept keyword
        arguments for models that divide by ``num_items_in_batch``, and multiplies the gradient by accumulation steps
        and processes.
        """

        def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            count = len(labels) if num_items_in_batch is None else num_items_in_batch
            return (
                cross_entropy(self.masked(outputs["logits"], labels).float(), labels, reduction="sum") / count
            )

        return summed


def load_classes(recipe: Recipe, columns: list[str], label: str) -> tuple[dict[Split, Dataset], Classes]:
    """Datasets by split, with their classes as numbers in a column ``labels``.

    Raises:
        OptionError: If a column is missing, or a class occurs outside the training data only.
    """
    parts = recipe.data.join or {"": recipe.data}
    loaded: dict[Split, list[Dataset]] = {}
    names: list[str] = []
    groups: list[int] = []
    for group, (task, settings) in enumerate(parts.items()):
        whole = read_data(settings)
        require_columns(whole, [*columns, label], "task")
        # Of all training examples: those that are left out, or held out, may be a class's only ones.
        known = _class_names(whole["train"], label)
        numbers = {value: len(names) + index for index, value in enumerate(known)}
        for split, data in chosen(whole, settings, recipe.optimisation.seed).items():
            loaded.setdefault(split, []).append(_numbered(data, split, label, numbers, columns))
        names += [f"{task}: {shown}" if task else shown for shown in known.values()]
        groups += [group] * len(known)
    joined = {s: concatenate_datasets(data) if len(data) > 1 else data[0] for s, data in loaded.items()}
    return joined, Classes(tuple(names), tuple(groups), tuple(parts))


def _class_names(data: Dataset, label: str) -> Mapping[Any, str]:
    feature = data.features[label]
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    values = set(data[label])
    if None in values:
        raise OptionError(f"the training data has examples without a class: `{label}` is empty there.")
    return {value: str(value) for value in sorted(values)}


def _numbered(
    data: Dataset, split: str, label: str, numbers: Mapping[Any, int], columns: list[str]
) -> Dataset:
    labels = data[label]
    strange = sorted({str(value) for value in labels if value not in numbers})
    if strange:
        raise OptionError(f"the {split} data has classes that the training data lacks: {listing(strange)}.")
    kept = data.select_columns(columns)
    return kept.add_column(CLASS, [numbers[value] for value in labels])
