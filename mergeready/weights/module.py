from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mergeready.weights.source import TensorInfo, WeightSource

_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and activation checkpointing put into it.

    >>> plain_name("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
    'encoder.weight'
    """
    parts = name.split(".")
    wrappers = {wrapper.rstrip(".") for wrapper in _WRAPPERS}
    # "module" may be a user's own attribute further down; only a leading one is DDP's.
    while parts and parts[0] in wrappers:
        parts = parts[1:]
    return ".".join(part for part in parts if part not in wrappers - {"module"})


def module_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters under their plain names, each tied group once."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


class ModuleSource(WeightSource):
    """Parameters and buffers of a live module; each read sees the values of that moment.

    Lists what a checkpoint would hold, so not the module's non-persistent buffers. The tensors are looked up
    once, at construction: make the source after anything that replaces parameter objects
    (``accelerator.prepare``, ``fully_shard``). Tied parameters are listed once, under the name that comes
    first in the module.
    """

    def __init__(self, module: nn.Module, label: str | None = None) -> None:
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
