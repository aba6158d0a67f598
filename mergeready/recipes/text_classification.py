from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from mergeready.experts.live import is_peft
from mergeready.recipes.classes import load_classes
from mergeready.recipes.classifier import load_classifier, prepare_classifier
from mergeready.recipes.load_model import find_model, load_tokenizer
from mergeready.recipes.prepared import Prepared
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import TextClassification


def prepare_text_classification(recipe: Recipe, task: TextClassification) -> Prepared:
    """A Trainer that fine-tunes a text classifier, and its evaluations.

    Raises:
        OptionError: If model or data are not as the recipe says.
    """
    columns = [task.text] if isinstance(task.text, str) else task.text
    raw, classes = load_classes(recipe, columns, task.label)
    found = find_model(recipe)
    tokenizer = load_tokenizer(recipe, found)

    model = load_classifier(recipe, found, AutoModelForSequenceClassification, classes)
    inner: Any = model
    forward = (inner.get_base_model() if is_peft(model) else inner).forward
    # With pairs, BERT and its like also take which of the two texts a token is of.
    taken = {"input_ids", "attention_mask", *inspect.signature(forward).parameters}

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            *(batch[column] for column in columns), truncation=True, max_length=task.max_tokens
        )
        return {name: values for name, values in encoded.items() if name in taken}

    splits = {split: data.map(encode, batched=True, remove_columns=columns) for split, data in raw.items()}
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    collate = DataCollatorWithPadding(tokenizer)
    return prepare_classifier(recipe, found, model, classes, splits, raw, tokenizer, collate)
