from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mergeready.weights.module import ModuleSource, unwrap
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
        # The library's save_model chooses another name of a tied tensor than the base of this run may have.
        source = ModuleSource(inner)
        tensors = {name: source.read(name).contiguous() for name in source.infos}
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt", **source.aliases})
    if processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder)
