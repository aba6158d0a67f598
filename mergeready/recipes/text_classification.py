from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.classes import CLASS, load_classes
from mergeready.recipes.evaluations import ClassMetric
from mergeready.recipes.load_model import find_model, load_model, load_tokenizer, with_trained
from mergeready.recipes.prepared import Prepared, evaluations
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import TextClassification


def prepare_text_classification(recipe: Recipe, task: TextClassification) -> Prepared:
    """A Trainer that fine-tunes a text classifier, and its evaluations.

    Raises:
        OptionError: If model or data are not as the recipe says.
    """
    columns = [task.text] if isinstance(task.text, str) else task.text
    raw, classes = load_classes(recipe, columns, task.label)
    found = find_model(recipe.model)
    tokenizer = load_tokenizer(recipe, found)

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            *(batch[column] for column in columns), truncation=True, max_length=task.max_tokens
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    splits = {split: data.map(encode, batched=True, remove_columns=columns) for split, data in raw.items()}
    names = dict(enumerate(classes.names))
    model = load_model(
        recipe,
        found,
        AutoModelForSequenceClassification,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    model = with_trained(recipe, model)
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model,
        TrainingArguments(
            **training_arguments(recipe, len(splits["train"])),
            remove_unused_columns=False,
            label_names=[CLASS],
        ),
        train_dataset=splits["train"],
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=classes.loss(),
    )
    wanted = recipe.optimisation
    made = evaluations(
        recipe,
        "accuracy",
        splits,
        raw,
        tokenizer,
        lambda metric, data: ClassMetric(
            metric, classes, data, collate, 4 * wanted.batch_size, wanted.precision
        ),
    )
    return Prepared(trainer, tokenizer, made, found if isinstance(found, str) else None)
