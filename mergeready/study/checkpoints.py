"""Experts of a study on disk: the trained parameters alone, or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mergeready.errors import OptionError, UnsupportedError
from mergeready.study.settings import AdapterSettings


def save_checkpoint(model: nn.Module, folder: Path, step: int) -> None:
    """Write what was trained: an adapter's folder, or a file with the parameters that have ``requires_grad``."""
    save_adapter: Any = getattr(model, "save_pretrained", None)
    if hasattr(model, "peft_config"):
        save_adapter(str(folder / f"step-{step}"))
        return
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(state, folder / f"step-{step}.safetensors", metadata={"format": "pt"})


def find_checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
        OptionError: If it is not there.
    """
    for path in (folder / f"step-{step}.safetensors", folder / f"step-{step}"):
        if path.exists():
            return path
    raise OptionError(f"{folder} has no checkpoint of step {step}.")


def saved_step(saved: Sequence[int], step: int) -> int:
    """The last saved step up to a step: where a run ended earlier, its end.

    >>> saved_step([8, 16, 21], 16), saved_step([8, 16, 21], 64)
    (16, 21)
    """
    return max(known for known in saved if known <= step)


def given_checkpoint(pattern: str, task: str, seed: int, step: int) -> Path:
    """A checkpoint that was trained elsewhere.

    Raises:
        OptionError: If none or several match the pattern.
    """
    path = Path(pattern.format(task=task, seed=seed, step=step)).expanduser()
    found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    if len(found) != 1:
        many = f"{len(found)} match" if found else "none matches"
        raise OptionError(f"`checkpoints`: one file or folder must match {path}, {many}.")
    return found[0]


def with_adapter(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """The model with a fresh LoRA adapter, which draws from torch's random state.

    Raises:
        UnsupportedError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedError(
            "adapters need PEFT: install it with `pip install 'mergeready[lora]'`."
        ) from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules=settings.targets,
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
