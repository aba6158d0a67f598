"""A recipe's model and its processor, ready to train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from mergeready.errors import OptionError
from mergeready.experts.base import Base
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


def base_of(found: str | nn.Module, revision: str | None) -> str | Base | None:
    """The weights that training starts from, of the revision that the recipe names; None where they come from nowhere.

    Raises:
        OptionError: If a revision is given of what is no hub id.
    """
    if not isinstance(found, str):
        return None
    return found if revision is None else Base.open(found, revision=revision)


@contextmanager
def loading(key: str, place: str) -> Iterator[None]:
    """What transformers says of a place where there is nothing to load, with the setting that names it.

    Raises:
        OptionError: If there is nothing.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OptionError(
            f"`{key}` names {place}, which cannot be loaded from a folder or the hub: {error}"
        ) from error


def load_model(
    recipe: Recipe, found: str | nn.Module, auto: Any, **options: Any
) -> tuple[nn.Module, list[str]]:
    """The model in the recipe's dtype, its new weights drawn with the recipe's seed.

    Returns:
        The model, and names of its modules that are new, such as a head: all that it has and what it was loaded from
        has not. Of a model that a function made, what PEFT takes for a head.

    Raises:
        OptionError: If there is no such model.
    """
    set_seed(recipe.optimisation.seed)
    dtype = getattr(torch, recipe.model.dtype)
    if isinstance(found, nn.Module):
        return found.to(dtype), [name for name in _HEADS if hasattr(found, name)]
    with loading("model", found):
        model, report = auto.from_pretrained(
            found, revision=recipe.model.revision, dtype=dtype, output_loading_info=True, **options
        )
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return model, _whole_modules(model, new)


def _whole_modules(model: nn.Module, parameters: set[str]) -> list[str]:
    """The largest modules all of whose parameters are among these."""
    found: list[str] = []
    every = [name for name, _ in model.named_parameters()]
    for module, _ in model.named_modules():
        own = [name for name in every if name.startswith(f"{module}.")]
        inside = any(module.startswith(f"{outer}.") for outer in found)
        if own and parameters.issuperset(own) and not inside:
            found.append(module)
    return found


def load_tokenizer(recipe: Recipe, found: str | nn.Module) -> Any:
    """The tokenizer, with a token to pad with.

    Raises:
        OptionError: If there is none, or a function made the model and nothing says where its tokenizer is.
    """
    place = _processor(recipe, found)
    with loading(_key(recipe), place):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=_revision(recipe))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(recipe: Recipe, found: str | nn.Module) -> Any:
    """What makes tensors of images.

    Raises:
        OptionError: As :func:`load_tokenizer`.
    """
    place = _processor(recipe, found)
    with loading(_key(recipe), place):
        return AutoImageProcessor.from_pretrained(place, revision=_revision(recipe))


def with_trained(recipe: Recipe, model: nn.Module, new: Sequence[str] = ()) -> nn.Module:
    """The model with its frozen parameters frozen, or with adapters.

    Adapters are drawn with the recipe's seed alone, so those of a team start alike whatever their heads have drawn.

    Args:
        recipe: The recipe.
        model: The model.
        new: Names of modules that what it was loaded from does not have. Beside adapters they are trained whole and
            saved, since whoever loads the base again draws others.

    Raises:
        OptionError: If a pattern of ``freeze`` finds no parameter, nothing is left to train, or PEFT is not installed.
    """
    lora = recipe.task.lora
    if lora is not None and recipe.task.kind != "causal-lm":  # TRL adds adapters itself
        try:
            import peft
        except ImportError as error:
            raise OptionError("adapters are PEFT's; run: pip install 'mergeready[lora]'") from error
        is_known = recipe.task.kind == "text-classification" and any(hasattr(model, name) for name in _HEADS)
        set_seed(recipe.optimisation.seed)
        model = peft.get_peft_model(model, lora_config(lora, "SEQ_CLS" if is_known else None, new))
    freeze(recipe, model)
    return model


def freeze(recipe: Recipe, model: nn.Module) -> None:
    """Freeze what the recipe says, adapters included.

    Raises:
        OptionError: If a pattern finds no parameter, or nothing is left to train.
    """
    named = {name.removeprefix(_INSIDE_PEFT): value for name, value in model.named_parameters()}
    idle = [p for p in recipe.optimisation.freeze if not any(re.search(p, name) for name in named)]
    if idle:
        raise OptionError(
            f"`optimisation.freeze`: {idle} finds no parameter; they are called like {next(iter(named))}."
        )
    for name, parameter in named.items():
        if any(re.search(pattern, name) for pattern in recipe.optimisation.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptionError("`optimisation.freeze` leaves nothing to train.")


def lora_config(settings: LoraSettings, kind: str | None, whole: Sequence[str] = ()) -> Any:
    """PEFT's configuration of the adapters, and of the modules that are trained whole beside them."""
    import peft

    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        modules_to_save=list(whole) or None,
        task_type=kind,
    )


_HEADS = ("classifier", "score")
"""What PEFT takes for the head of a classifier."""
_INSIDE_PEFT = "base_model.model."


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


def _key(recipe: Recipe) -> str:
    return "model" if recipe.model.processor is None else "model.processor"


def _revision(recipe: Recipe) -> str | None:
    return recipe.model.revision if recipe.model.processor is None else None
