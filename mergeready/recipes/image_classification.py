from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from mergeready.errors import OptionError
from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.classes import CLASS, Classes, load_classes
from mergeready.recipes.evaluations import ClassMetric
from mergeready.recipes.load_model import find_model, load_image_processor, load_model, with_trained
from mergeready.recipes.prepared import Prepared, evaluations
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import ImageClassification
from mergeready.recipes.zero_shot import zero_shot_classifier


def prepare_image_classification(recipe: Recipe, task: ImageClassification) -> Prepared:
    """A Trainer that fine-tunes an image classifier, and its evaluations.

    Raises:
        OptionError: If model or data are not as the recipe says.
    """
    raw, classes = load_classes(recipe, [task.image], task.label)
    found = find_model(recipe.model)
    processor = load_image_processor(recipe, found)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [row[task.image].convert("RGB") for row in rows]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, CLASS: torch.tensor([row[CLASS] for row in rows])}

    model = with_trained(recipe, _model(recipe, task, classes, found))
    trainer = Trainer(
        model,
        TrainingArguments(
            **training_arguments(recipe, len(raw["train"])), remove_unused_columns=False, label_names=[CLASS]
        ),
        train_dataset=raw["train"],
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=classes.loss(),
    )
    wanted = recipe.optimisation
    made = evaluations(
        recipe,
        "accuracy",
        raw,
        raw,
        processor,
        lambda metric, data: ClassMetric(
            metric, classes, data, collate, 4 * wanted.batch_size, wanted.precision
        ),
    )
    return Prepared(trainer, processor, made, found if isinstance(found, str) else None)


def _model(recipe: Recipe, task: ImageClassification, classes: Classes, found: Any) -> torch.nn.Module:
    if task.head == "trained":
        names = dict(enumerate(classes.names))
        return load_model(
            recipe,
            found,
            AutoModelForImageClassification,
            num_labels=len(names),
            id2label=names,
            label2id={name: index for index, name in names.items()},
            ignore_mismatched_sizes=True,  # the pretrained head is for other classes
        )
    if not isinstance(found, str):
        raise OptionError("`task.head: zero-shot` needs a folder or hub id of a CLIP model in `model`.")
    names_given = task.class_names or list(classes.names)
    if len(names_given) != len(classes.names):
        raise OptionError(
            f"`task.class_names` has {len(names_given)} names for {len(classes.names)} classes."
        )
    return zero_shot_classifier(found, recipe, [task.prompt.format(name) for name in names_given])
