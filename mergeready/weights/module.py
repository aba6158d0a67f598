from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergeready.weights.live import LiveSource
from mergeready.weights.shards import reshard
from mergeready.weights.source import TensorInfo

_INNER_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_OUTER_WRAPPERS = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _OUTER_WRAPPERS:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_name(name: str) -> str:
    """A parameter's name without what compiled or checkpointed submodules put into it.

    >>> plain_name("encoder._checkpoint_wrapped_module.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _INNER_WRAPPERS)


def module_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module, looked at through its wrappers, under plain names, each tied group once."""
    reshard(module)
    return {plain_name(name): parameter for name, parameter in unwrap(module).named_parameters()}


class ModuleSource(LiveSource):
    """Parameters and buffers of a live module; each read sees the values of that moment.

    Lists what a checkpoint would hold, so not the module's non-persistent buffers. The tensors are looked up
    once, at construction: make the source after anything that replaces parameter objects
    (``accelerator.prepare``, ``fully_shard``). Tied parameters are listed once, under the name that comes
    first in the module.
    """

    def __init__(self, module: nn.Module, label: str | None = None) -> None:
        module = unwrap(module)
        reshard(module)  # what is gathered for the moment would be looked up else
        tensors: dict[str, Tensor] = {
            plain_name(name): parameter for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        passing = _non_persistent(module)
        tensors |= {plain_name(n): buffer for n, buffer in module.named_buffers() if n not in passing}
        super().__init__(tensors, label or f"live {type(module).__name__}")
        self._stored = _stored_names(module, self.infos)

    @property
    def stored_names(self) -> Mapping[str, str]:
        return self._stored


def _stored_names(module: nn.Module, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """What files have for names that transformers changes as it loads, and changes back as it saves.

    Only where a tensor is one in the file as well; experts of mixtures that it stacks are none.
    """
    if not any(ancestor.__name__ == "PreTrainedModel" for ancestor in type(module).__mro__):
        return {}
    # The module is loaded, since the model is one of its library's; nothing here may import a framework.
    change_back = getattr(
        sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None
    )
    if change_back is None:
        return {}
    marks = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
    names = {id(mark): name for name, mark in marks.items()}
    stored = {name: names.get(id(mark)) for name, mark in change_back(module, marks).items()}
    return {name: own for name, own in stored.items() if own is not None and own != name}


def _non_persistent(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
