"""A recipe's model and its processor, ready to train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from mergeready.errors import OptionError
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.tasks import LoraSettings
from mergeready.targets import call_target, is_target


def find_model(recipe: Recipe) -> str | nn.Module:
    """A folder, a hub id, or a model that a function made, which draws with the recipe's seed.

    Raises:
        OptionError: If a function returns anything else.
    """
    settings = recipe.model
    if not is_target(settings.name):
        return settings.name
    set_seed(recipe.optimisation.seed)
    found = call_target(settings.name, "model", settings.arguments)
    if isinstance(found, str | Path):
        return str(found)
    if not isinstance(found, nn.Module):
        raise OptionError(
            f"`model`: {settings.name} gave a {type(found).__name__} instead of a model or where one is."
        )
    return found


def load_model(recipe: Recipe, found: str | nn.Module, auto: Any, **options: Any) -> nn.Module:
    """The model in the recipe's dtype, its new weights drawn with the recipe's seed."""
    set_seed(recipe.optimisation.seed)
    dtype = getattr(torch, recipe.model.dtype)
    if isinstance(found, nn.Module):
        return found.to(dtype)
    model: nn.Module = auto.from_pretrained(found, revision=recipe.model.revision, dtype=dtype, **options)
    return model


def load_tokenizer(recipe: Recipe, found: str | nn.Module) -> Any:
    """The tokenizer, with a token to pad with.

    Raises:
        OptionError: If a function made the model and nothing says where its tokenizer is.
    """
    tokenizer = AutoTokenizer.from_pretrained(_processor(recipe, found), revision=_revision(recipe))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(recipe: Recipe, found: str | nn.Module) -> Any:
    """What makes tensors of images.

    Raises:
        OptionError: As :func:`load_tokenizer`.
    """
    return AutoImageProcessor.from_pretrained(_processor(recipe, found), revision=_revision(recipe))


def with_trained(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The model with its frozen parameters frozen, or with adapters.

    Adapters are drawn with the recipe's seed alone, so those of a team start alike whatever their heads have drawn.

    Raises:
        OptionError: If a pattern of ``freeze`` finds no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    idle = [p for p in recipe.optimisation.freeze if not any(re.search(p, name) for name in names)]
    if idle:
        raise OptionError(
            f"`optimisation.freeze`: {idle} finds no parameter; they are called like {names[0]}."
        )
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in recipe.optimisation.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptionError("`optimisation.freeze` leaves nothing to train.")
    if recipe.task.lora is None or recipe.task.kind == "causal-lm":  # TRL adds adapters itself
        return model
    import peft

    kind = "SEQ_CLS" if recipe.task.kind == "text-classification" and hasattr(model, "classifier") else None
    set_seed(recipe.optimisation.seed)
    adapted: nn.Module = peft.get_peft_model(model, lora_config(recipe.task.lora, kind))
    return adapted


def lora_config(settings: LoraSettings, kind: str | None) -> Any:
    """PEFT's configuration of the adapters."""
    import peft

    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        task_type=kind,
    )


def _processor(recipe: Recipe, found: str | nn.Module) -> str:
    if recipe.model.processor is not None:
        name = recipe.model.processor
        return str(call_target(name, "model.processor", {})) if is_target(name) else name
    if isinstance(found, str):
        return found
    place = getattr(found, "name_or_path", "")
    if place:
        return str(place)
    raise OptionError(
        "`model` is made by a function, so `model.processor` must say where its tokenizer or image processor is."
    )


def _revision(recipe: Recipe) -> str | None:
    return recipe.model.revision if recipe.model.processor is None else None
