from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from mergeready.errors import OptionError
from mergeready.recipes.classes import CLASS, Classes, load_classes
from mergeready.recipes.classifier import load_classifier, prepare_classifier
from mergeready.recipes.load_model import find_model, load_image_processor, loading, with_trained
from mergeready.recipes.prepared import Prepared
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import ImageClassification
from mergeready.recipes.zero_shot import zero_shot_classifier


def prepare_image_classification(recipe: Recipe, task: ImageClassification) -> Prepared:
    """A Trainer that fine-tunes an image classifier, and its evaluations.

    Raises:
        OptionError: If model or data are not as the recipe says.
    """
    raw, classes = load_classes(recipe, [task.image], task.label)
    found = find_model(recipe)
    processor = load_image_processor(recipe, found)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [row[task.image].convert("RGB") for row in rows]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, CLASS: torch.tensor([row[CLASS] for row in rows])}

    model = _model(recipe, task, classes, found)
    return prepare_classifier(recipe, found, model, classes, raw, raw, processor, collate)


def _model(recipe: Recipe, task: ImageClassification, classes: Classes, found: Any) -> torch.nn.Module:
    if task.head == "trained":
        # The pretrained head is for other classes.
        return load_classifier(
            recipe, found, AutoModelForImageClassification, classes, ignore_mismatched_sizes=True
        )
    if not isinstance(found, str):
        raise OptionError("`task.head: zero-shot` needs a folder or hub id of a CLIP model in `model`.")
    names = task.class_names or list(classes.plain)
    if len(names) != len(classes.names):
        raise OptionError(f"`task.class_names` has {len(names)} names for {len(classes.names)} classes.")
    with loading("model", found):
        model = zero_shot_classifier(found, recipe, [task.prompt.format(name) for name in names])
    return with_trained(recipe, model)
