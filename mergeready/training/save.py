from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from mergeready.experts.live import unwrap
from mergeready.weights.safetensors_folder import SINGLE_NAME


def save_expert(model: nn.Module, folder: Path, processor: Any = None) -> None:
    """Write a model into a folder so that it can be loaded, merged and shared as an expert.

    Models with ``save_pretrained`` write themselves, PEFT models their adapter; others their state as safetensors.

    Args:
        model: The model; wrappers are looked through.
        folder: An existing folder.
        processor: A tokenizer or processor that belongs with it.
    """
    inner: Any = unwrap(model)
    if hasattr(inner, "save_pretrained"):
        inner.save_pretrained(folder)
    else:
        save_model(inner, str(folder / SINGLE_NAME))
    if processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder)
