from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mergeready.experts.live import is_peft
from mergeready.weights.module import ModuleSource, unwrap
from mergeready.weights.ranks import is_first_process
from mergeready.weights.safetensors_folder import SINGLE_NAME


def save_expert(model: nn.Module, folder: Path, processor: Any = None) -> None:
    """Write a model into a folder so that it can be loaded, merged and shared as an expert.

    Models with ``save_pretrained`` write themselves, PEFT models the adapter that is active; others their state.

    In a run of several processes, all of them call it and the first one writes; a sharded model is gathered into its
    memory, on the CPU, for that.

    Args:
        model: The model; wrappers are looked through.
        folder: An existing folder; it needs to exist for the first process only.
        processor: A tokenizer or processor that belongs with it.
    """
    inner: Any = unwrap(model)
    source = ModuleSource(inner)
    gathered = _gathered_state(inner) if source.is_sharded else None
    if not is_first_process():
        return
    if hasattr(inner, "save_pretrained"):
        settings: dict[str, Any] = {} if gathered is None else {"state_dict": gathered}
        if is_peft(inner):
            _save_adapter(inner, folder, settings)
        else:
            inner.save_pretrained(folder, **settings)
    else:
        # The library's save_model chooses another name of a tied tensor than the base of this run may have.
        tensors = {
            name: (source.read(name) if gathered is None else gathered[name]).contiguous()
            for name in source.infos
        }
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt", **source.aliases})
    if processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder)


def _save_adapter(model: Any, folder: Path, settings: dict[str, Any]) -> None:
    """The adapter that trains, without others such as a reference, and not in a subfolder of its name."""
    [name] = model.active_adapters
    model.save_pretrained(folder, selected_adapters=[name], **settings)
    named = folder / name
    if name != "default" and named.is_dir():
        for path in named.iterdir():
            path.rename(folder / path.name)
        named.rmdir()


def _gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state on the first process, nothing on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    return dict(state)
