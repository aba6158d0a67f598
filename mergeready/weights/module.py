from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mergeready.weights.source import TensorInfo, WeightSource

_INNER_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_OUTER_WRAPPERS = {"DistributedDataParallel", "DataParallel"}


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
    return {plain_name(name): parameter for name, parameter in unwrap(module).named_parameters()}


class ModuleSource(WeightSource):
    """Parameters and buffers of a live module; each read sees the values of that moment.

    Lists what a checkpoint would hold, so not the module's non-persistent buffers. The tensors are looked up
    once, at construction: make the source after anything that replaces parameter objects
    (``accelerator.prepare``, ``fully_shard``). Tied parameters are listed once, under the name that comes
    first in the module.
    """

    def __init__(self, module: nn.Module, label: str | None = None) -> None:
        module = unwrap(module)
        self.label = label or f"live {type(module).__name__}"
        self._tensors: dict[str, Tensor] = dict(module_parameters(module))
        passing = _non_persistent(module)
        self._tensors |= {plain_name(n): buffer for n, buffer in module.named_buffers() if n not in passing}
        self._infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self._aliases = _tied_names(module)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].detach().reshape(-1)[start:stop]


def _tied_names(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = plain_name(name)
        canonical = first.setdefault(id(parameter), plain)
        if canonical != plain:
            aliases[plain] = canonical
    return aliases


def _non_persistent(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
