"""What a task hands to the run: a Trainer without our callback, and evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import Trainer

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.merging.evaluation import Evaluate
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.sources import Split
from mergeready.targets import call_target, is_target

METRICS = ("accuracy", "loss")


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train.

    Attributes:
        trainer: The Trainer, without our callback.
        processor: Tokenizer or image processor.
        evaluations: An evaluation for each of ``validation`` and, if there is one, ``test``.
        base: The weights that training starts from, where they come from a folder or hub id.
    """

    trainer: Trainer
    processor: Any
    evaluations: dict[str, Evaluate]
    base: str | Base | None


def evaluations(
    recipe: Recipe,
    default: str,
    splits: dict[Split, Dataset],
    raw: dict[Split, Dataset],
    processor: Any,
    built_in: Callable[[str, Dataset], Evaluate],
) -> dict[str, Evaluate]:
    """The recipe's evaluation on every split that is not trained on.

    Args:
        recipe: The recipe.
        default: The metric if the recipe names none.
        splits: Encoded examples.
        raw: Examples as they were loaded, for evaluations in Python.
        processor: Tokenizer or image processor.
        built_in: Makes the evaluation of a built-in metric.

    Raises:
        OptionError: If there is no such metric or function.
    """
    wanted = recipe.evaluation
    name = default if wanted is None else wanted.name
    made: dict[str, Evaluate] = {}
    for split in ("validation", "test"):
        if split not in splits:
            continue
        if is_target(name) and wanted is not None:
            about = {"data": raw, "split": split, "processor": processor}
            made[split] = call_target(name, "evaluation", {**about, **wanted.arguments})
        elif name in METRICS:
            made[split] = built_in(name, splits[split])
        else:
            raise OptionError(
                f"`evaluation` must be one of {', '.join(METRICS)} or module:function, not {name!r}."
            )
    return made
