from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from mergeready.errors import OptionError, listing
from mergeready.merging.evaluation import Evaluate
from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.evaluations import TokenMetric
from mergeready.recipes.load_data import load_data
from mergeready.recipes.load_model import (
    base_of,
    find_model,
    freeze,
    load_model,
    load_tokenizer,
    lora_config,
)
from mergeready.recipes.prepared import Prepared, evaluations
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import CausalLM


def prepare_causal_lm(recipe: Recipe, task: CausalLM) -> Prepared:
    """TRL's trainer for supervised fine-tuning, and evaluations.

    Raises:
        OptionError: If model or data are not as the recipe says, or TRL is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise OptionError(
            "language models are trained by TRL; run: pip install 'mergeready[trl,lora]'"
        ) from error
    raw = load_data(recipe.data, recipe.optimisation.seed)
    columns = _learned_from(raw.values(), task)
    given = {split: data.select_columns(columns) for split, data in raw.items()}
    found = find_model(recipe)
    tokenizer = load_tokenizer(recipe, found)
    first = given["train"][0] if len(given["train"]) else {}
    if trl.is_conversational(first) and tokenizer.chat_template is None:
        raise OptionError(
            "`data` holds chats, and the tokenizer of `model` has no template that makes texts of them: take a model "
            "that was made for chats, or name a tokenizer with `model.processor`."
        )
    model, _ = load_model(recipe, found, AutoModelForCausalLM)
    arguments = trl.SFTConfig(
        **{"gradient_checkpointing": False, **training_arguments(recipe)},
        max_length=task.max_tokens,
        packing=task.packing,
        assistant_only_loss=task.assistant_only,
        dataset_text_field=task.text,
        eval_packing=False,
    )
    held = {split: data for split, data in given.items() if split != "train"}
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=given["train"],
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=None if task.lora is None else lora_config(task.lora, "CAUSAL_LM"),
    )
    freeze(recipe, trainer.model)
    encoded = dict(trainer.eval_dataset)
    size, precision = recipe.optimisation.batch_size, recipe.optimisation.precision

    def built_in(metric: str, data: Dataset) -> Evaluate:
        return TokenMetric(metric, data, lambda rows: padded(rows, tokenizer.pad_token_id), size, precision)

    made = evaluations(recipe, "loss", encoded, raw, tokenizer, built_in)
    return Prepared(trainer, tokenizer, made, base_of(found, recipe.model.revision))


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch of examples as TRL encodes them; its own collator joins them into one sequence where training is packed.

    Newer TRL says in ``labels`` which tokens are learned, older in masks.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, all int64 of shape (batch, longest); ``labels`` are -100 at
        padding and at tokens that are not learned.

    Example:
        >>> batch = padded([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}], pad=0)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6], [7, 0]], [[-100, 6], [7, -100]])
    """
    tokens = [torch.tensor(row["input_ids"]) for row in rows]

    def side_by_side(parts: list[Tensor], filler: int) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=filler)

    return {
        "input_ids": side_by_side(tokens, pad),
        "attention_mask": side_by_side([torch.ones_like(part) for part in tokens], 0),
        "labels": side_by_side([torch.tensor(_learned(row)) for row in rows], -100),
    }


def _learned(row: Mapping[str, Any]) -> list[int]:
    """The tokens of an example that are learned; -100 in place of others."""
    if "labels" in row:
        return list(row["labels"])
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    return [token if all(bits) else -100 for token, *bits in zip(row["input_ids"], *masks, strict=True)]


_FOR_TEMPLATES = ("tools", "chat_template_kwargs")


def _learned_from(splits: Iterable[Dataset], task: CausalLM) -> list[str]:
    """The columns that TRL shall see: it guesses the kind of data from what is there, and one too many misleads it."""
    every = set.intersection(*(set(data.column_names) for data in splits))
    kinds: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("messages",), (task.text,))
    for kind in kinds:
        if every.issuperset(kind):
            return [*kind, *(name for name in _FOR_TEMPLATES if name in every)]
    raise OptionError(
        f"`data` has the columns {listing(sorted(every))} in all splits; a language model learns from `prompt` and "
        f"`completion`, else from `messages`, else from `{task.text}` (`task.text`)."
    )
