"""What trains, by base parameter name: whole parameters, and factors of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergeready.errors import UnsupportedError, listing
from mergeready.experts.live import LiveExpert
from mergeready.weights.shards import Held, held, is_sharded, local, placed_like, whole


class Trained(ABC):
    """One parameter of the base that changes in training, in the part that this rank holds.

    Attributes:
        name: Its name in the base.
        block: What this rank holds of it.
    """

    name: str
    block: Held

    @property
    @abstractmethod
    def place(self) -> Tensor:
        """The model's own tensor, sharded as it is, that moves the effective weight when it is written."""

    @property
    def target(self) -> Tensor:
        """What this rank holds of it: what forward computes with."""
        return local(self.place)

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates for it."""

    @abstractmethod
    def delta(self) -> Tensor:
        """τ of this moment, fp32, in the block's shape; a new tensor."""

    def whole_delta(self) -> Tensor:
        """τ of the whole parameter, fp32. A collective where it is sharded."""
        return whole(placed_like(self.place, self.delta()))

    @abstractmethod
    def add_gradient(self, gradient: Tensor, factor: float = 1.0) -> None:
        """Add to ``.grad`` of its parameters what a gradient with respect to the effective weight means for them.

        Args:
            gradient: In the block's shape.
            factor: Multiplied onto it.
        """


class Whole(Trained):
    """A parameter that is trained itself.

    The base's values are read once and kept beside it, in their own precision: most techniques need them at each step.
    """

    def __init__(self, name: str, parameter: nn.Parameter, read_base: Any) -> None:
        self.name, self.block = name, held(parameter)
        self._parameter, self._read = parameter, read_base
        self._base: Tensor | None = None

    @property
    def place(self) -> Tensor:
        return self._parameter

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self._parameter]

    @property
    def base(self) -> Tensor:
        """The base's values in the block's shape, on the parameter's device, in the dtype they are stored in."""
        if self._base is None:
            stored: Tensor = self._read().reshape(self.block.sizes)
            self._base = stored.to(self.target.device, copy=True)
        return self._base

    def delta(self) -> Tensor:
        return self.target.float().sub(self.base.float())

    def add_gradient(self, gradient: Tensor, factor: float = 1.0) -> None:
        add_to_gradient(self._parameter, gradient, factor)


class Factored(Trained):
    """A parameter that a LoRA adapter of PEFT changes."""

    def __init__(self, name: str, target: Tensor, layer: Any, adapter: str) -> None:
        self.name, self.block = name, held(target)
        self._target, self._layer, self._adapter = target, layer, adapter
        prefix = "lora_embedding_" if adapter in layer.lora_embedding_A else "lora_"
        factors = [getattr(layer, f"{prefix}{kind}")[adapter] for kind in "AB"]
        self.factors: list[nn.Parameter] = [getattr(factor, "weight", factor) for factor in factors]

    @property
    def place(self) -> Tensor:
        return self._target

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [factor for factor in self.factors if factor.requires_grad]

    @property
    def is_transposed(self) -> bool:
        """Whether the change is ``(B A)ᵀ``: of layers that store their weight as (inputs, outputs), and embeddings."""
        return bool(getattr(self._layer, "fan_in_fan_out", False)) or not self._layer.lora_A

    def change(self) -> Tensor:
        """τ with its graph back to the factors, laid out over ranks as the weight. A collective where it is sharded."""
        change: Any = self._layer.get_delta_weight(self._adapter)
        return _as_sharded_as(self._target, change.reshape(self.block.shape))

    def delta(self) -> Tensor:
        with torch.no_grad():
            return local(self.change()).float().reshape(self.block.sizes)

    def add_gradient(self, gradient: Tensor, factor: float = 1.0) -> None:
        with torch.enable_grad():
            change = self.change()
            above = placed_like(change, gradient.to(change.dtype).reshape(self.block.sizes))
            parts = torch.autograd.grad(change, self.parameters, above)
        for parameter, part in zip(self.parameters, parts, strict=True):
            add_to_gradient(parameter, local(_as_sharded_as(parameter, part)), factor)


def _as_sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    if not is_sharded(like):
        return tensor
    return cast("Tensor", cast("Any", tensor).redistribute(placements=cast("Any", like).placements))


@torch.no_grad()
def add_to_gradient(parameter: nn.Parameter, gradient: Tensor, factor: float = 1.0) -> None:
    """``parameter.grad += factor · gradient``, on what this rank holds; a missing gradient counts as zero.

    A parameter that is frozen by now gets none, or the optimizer would move it.
    """
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    own = local(parameter.grad)
    own.add_(gradient.to(own.device, own.dtype), alpha=factor)


def trained_weights(live: LiveExpert) -> dict[str, Trained]:
    """What trains in a model, or has trained in this run, by base parameter name.

    Tied weights are there once, also where the base holds them twice.

    Raises:
        UnsupportedError: For adapters whose factors cannot be reached one by one: DoRA, stacks of experts, token rows,
            and trained biases of LoRA layers; all are listed.
    """
    if live.is_peft:
        return _of_adapter(live)
    found: dict[int, Trained] = {}
    for name, target in live.targets.items():
        if name in live.vector and id(target) not in found:
            found[id(target)] = _whole(live, name, cast("nn.Parameter", target))
    return {weight.name: weight for weight in found.values()}


def _whole(live: LiveExpert, name: str, parameter: nn.Parameter) -> Whole:
    block = held(parameter)
    return Whole(name, parameter, lambda: block.read(live.base.source, name))


def _of_adapter(live: LiveExpert) -> dict[str, Trained]:
    model = cast("Any", live.model)
    adapter = str(model.active_adapters[0])
    layers, copies = _layers(model, adapter)
    found: dict[str, Trained] = {}
    refused = []
    for name in live.vector:
        target = live.targets[name]
        layer, copy = layers.get(id(target)), copies.get(id(target))
        if copy is not None:
            found[name] = _whole(live, name, copy)
        elif layer is not None and not layer.use_dora.get(adapter):
            found[name] = Factored(name, target, layer, adapter)
        else:
            refused.append(name)
    if refused:
        raise UnsupportedError(
            "techniques that work on weights support plain LoRA and `modules_to_save`; not DoRA, stacks of experts, "
            f"token rows and LoRA biases: {listing(refused, 6)}."
        )
    return found


def _layers(model: nn.Module, adapter: str) -> tuple[dict[int, Any], dict[int, nn.Parameter]]:
    """The LoRA layer of each base weight, and the trained copy of each base parameter, by identity."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    layers: dict[int, Any] = {}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A):
            layers[id(cast("Any", module.get_base_layer()).weight)] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            trained = dict(module.modules_to_save[adapter].named_parameters())
            for name, parameter in module.original_module.named_parameters():
                copies[id(parameter)] = trained[name]
    return layers, copies
