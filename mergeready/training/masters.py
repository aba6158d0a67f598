"""Finer copies of weights that a training keeps beside its 16-bit parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mergeready.errors import MismatchError, listing
from mergeready.experts.stored import is_coarse
from mergeready.weights.live import Finer
from mergeready.weights.module import module_parameters
from mergeready.weights.shards import local

MastersLike: TypeAlias = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
"""Parameter name to its fp32 copy; or a function that gives such a mapping, called on every rank before each
measurement, for trainings that put copies together on request."""

_LEFT_OVER = ("kahan_comp", "compensation")  # torch-optimi; torchdistx and what descends from it
_BLOCK = 2**22


class Masters:
    """Finds the finest copy there is of each parameter.

    Parameters in fp32, as under autocast and under FSDP2's mixed precision, are the finest themselves. Optimizers that
    train 16-bit parameters may keep fp32 copies, in their state or as the parameters that they step, and round these
    into the model; others keep what rounding left over (Kahan summation). A copy is told by its values: it has the
    parameter's shape and rounds to it exactly. So nothing else can be taken for one, whatever an optimizer calls it,
    and what is read in the parameter's place is never less exact.

    Args:
        model: The model.
        optimizers: The training's optimizers; wrappers such as accelerate's are looked through.
        given: Copies that are kept elsewhere, by the model's own parameter names.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False).bfloat16()
        >>> copies = {"weight": model.weight.detach().float() + 1e-5}
        >>> masters = Masters(model, [], copies)
        >>> masters.look()
        >>> masters.find("weight", model.weight)[0] is copies["weight"]
        True
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[Any] = (), given: MastersLike | None = None
    ) -> None:
        self._parameters = {n: p for n, p in module_parameters(model).items() if is_coarse(p.dtype)}
        # An adapter's tensors are looked at under other names, and as other objects on the same memory.
        self._names = {_address(parameter): name for name, parameter in self._parameters.items()}
        self._optimizers = [_unwrapped(optimizer) for optimizer in optimizers]
        self._given = given
        self._copies: Mapping[str, Tensor] = {}
        self._stepped: dict[tuple[int, ...], list[Tensor]] = {}
        self._places: dict[str, int] = {}

    @property
    def needed(self) -> bool:
        """Whether there are parameters of which a finer copy may exist."""
        return bool(self._parameters)

    def look(self) -> None:
        """See what the optimizers step now; take the given copies, and check them. Before each measurement.

        Raises:
            MismatchError: If some are of no 16-bit parameter of the model, of another shape, or do not round to what
                the model holds; all are listed.
        """
        stepped = [tensor for optimizer in self._optimizers for tensor in _stepped(optimizer)]
        self._stepped = {}
        for tensor in stepped:
            if tensor.dtype == torch.float32:
                self._stepped.setdefault(tuple(tensor.shape), []).append(tensor)
        if self._given is None:
            return
        copies = self._given() if callable(self._given) else self._given
        strange = [
            name
            for name, copy in copies.items()
            if name not in self._parameters or not _alike(self._parameters[name], copy)
        ]
        if strange:
            raise MismatchError(
                f"`masters` names what is no 16-bit parameter of the model, or of another shape: {listing(strange)}."
            )
        stale = [name for name, copy in copies.items() if not _rounds_to(self._parameters[name], [copy])]
        if stale:
            raise MismatchError(
                f"`masters` and the model differ by more than rounding: {listing(stale)}. Round the copies into the "
                "model after each optimizer step, before the monitor is called."
            )
        self._copies = copies

    def find(self, name: str, tensor: Tensor) -> Finer | None:
        """The finest copy of one of the model's tensors; None where it is the finest itself."""
        own = name if name in self._parameters else self._names.get(_address(tensor), "")
        if own not in self._parameters:
            return None
        if own in self._copies:
            return [self._copies[own]]
        parameter = self._parameters[own]
        kept = next((copy for copy in self._kept_beside(parameter) if _rounds_to(parameter, copy)), None)
        return self._stepped_for(own, parameter) if kept is None else kept

    def _kept_beside(self, parameter: Tensor) -> Iterator[Finer]:
        """What optimizers hold in their state of a parameter."""
        for optimizer in self._optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and _alike(parameter, value):
                    if key in _LEFT_OVER:
                        yield [parameter, value]
                    elif value.dtype == torch.float32:
                        yield [value]

    def _stepped_for(self, name: str, parameter: Tensor) -> Finer | None:
        """Which of the tensors that optimizers step is a parameter's copy; first that in the place of last time."""
        stepped, last = self._stepped.get(tuple(parameter.shape), []), self._places.get(name)
        for place in sorted(range(len(stepped)), key=lambda place: place != last):
            if _alike(parameter, stepped[place]) and _rounds_to(parameter, [stepped[place]]):
                self._places[name] = place
                return [stepped[place]]
        return None


def _stepped(optimizer: Any) -> Iterator[Tensor]:
    """What the optimizer steps; apex keeps the copies that it steps in groups of their own."""
    for group in [*optimizer.param_groups, *getattr(optimizer, "param_groups_master", [])]:
        yield from (tensor for tensor in group["params"] if tensor is not None)


def _unwrapped(optimizer: Any) -> Any:
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _address(tensor: Tensor) -> int:
    """What tells a tensor's memory; 0 where this rank holds none of it."""
    return local(tensor).data_ptr()


def _alike(parameter: Tensor, other: Tensor) -> bool:
    return parameter.shape == other.shape and local(parameter).shape == local(other).shape


def _rounds_to(parameter: Tensor, copy: Finer) -> bool:
    """Whether the sum of ``copy`` rounds to the parameter. Most others are told by the first few values."""
    target = local(parameter).reshape(-1)
    parts = [local(part).reshape(-1) for part in copy]
    start, step = 0, 64
    while start < len(target):
        stop = start + step
        total = parts[0][start:stop].float()
        for part in parts[1:]:
            total = total + part[start:stop].float()
        if not torch.equal(total.to(device=target.device, dtype=target.dtype), target[start:stop]):
            return False
        start, step = stop, _BLOCK
    return True
