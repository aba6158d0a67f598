"""What classifiers of texts and of images have in common."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.classes import CLASS, Classes
from mergeready.recipes.evaluations import ClassMetric, Collate
from mergeready.recipes.load_model import base_of, load_model, with_trained
from mergeready.recipes.prepared import Prepared, evaluations
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.sources import Split


def load_classifier(
    recipe: Recipe, found: str | nn.Module, auto: Any, classes: Classes, **options: Any
) -> nn.Module:
    """What trains: the model with a head for the classes, which its configuration names.

    Raises:
        OptionError: As :func:`~mergeready.recipes.load_model.with_trained`.
    """
    names = dict(enumerate(classes.names))
    numbers = {name: index for index, name in names.items()}
    model, new = load_model(
        recipe, found, auto, num_labels=len(names), id2label=names, label2id=numbers, **options
    )
    return with_trained(recipe, model, new)


def prepare_classifier(
    recipe: Recipe,
    found: str | nn.Module,
    model: nn.Module,
    classes: Classes,
    splits: dict[Split, Dataset],
    raw: dict[Split, Dataset],
    processor: Any,
    collate: Collate,
) -> Prepared:
    """A Trainer that fine-tunes a classifier, and its evaluations.

    Args:
        recipe: The recipe.
        found: Where the model is from.
        model: The classifier, with what it trains.
        classes: Its classes.
        splits: Examples as ``collate`` takes them.
        raw: Examples as they were loaded.
        processor: Tokenizer or image processor.
        collate: Makes a batch of examples.

    Raises:
        OptionError: If there is no such evaluation.
    """
    wanted = recipe.optimisation
    trainer = Trainer(
        model,
        TrainingArguments(**training_arguments(recipe), remove_unused_columns=False, label_names=[CLASS]),
        train_dataset=splits["train"],
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=classes.loss(),
    )

    def built_in(metric: str, data: Dataset) -> ClassMetric:
        return ClassMetric(metric, classes, data, collate, 4 * wanted.batch_size, wanted.precision)

    made = evaluations(recipe, "accuracy", splits, raw, processor, built_in)
    return Prepared(trainer, processor, made, base_of(found, recipe.model.revision))
