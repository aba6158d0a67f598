from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeready.errors import OptionError, listing
from mergeready.merging.evaluation import Evaluate
from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.evaluations import TokenMetric
from mergeready.recipes.load_data import load_data
from mergeready.recipes.load_model import find_model, load_model, load_tokenizer, lora_config, with_trained
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
    model = with_trained(recipe, load_model(recipe, found, AutoModelForCausalLM))
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
    encoded = dict(trainer.eval_dataset)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = trainer.data_collator([{k: v for k, v in row.items() if k in _TOKENS} for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def built_in(metric: str, data: Dataset) -> Evaluate:
        return TokenMetric(
            metric, data, collate, recipe.optimisation.batch_size, recipe.optimisation.precision
        )

    made = evaluations(recipe, "loss", encoded, raw, tokenizer, built_in)
    return Prepared(trainer, tokenizer, made, found if isinstance(found, str) else None)


_TOKENS = ("input_ids", "completion_mask", "assistant_masks")
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
