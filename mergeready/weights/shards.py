"""What one rank holds of a tensor that is sharded over several (DTensor), and how to see the rest of it."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergeready.errors import UnsupportedError, listing
from mergeready.weights.source import WeightSource

logger = logging.getLogger("mergeready")


@dataclass(frozen=True, slots=True)
class Held:
    """The block of a tensor that this rank holds: all of it where it is not sharded.

    Attributes:
        shape: Shape of the whole tensor.
        offset: Where the block begins, by dimension.
        sizes: Shape of the block; a dimension is 0 where this rank holds nothing.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int] | None:
        """The block as elements ``start`` to ``stop`` in row-major order; None where it is not one range of them.

        >>> Held((4, 3), (2, 0), (2, 3)).span, Held((4, 3), (0, 1), (4, 1)).span
        ((6, 12), None)
        """
        if not math.prod(self.sizes):
            return 0, 0
        if not self.shape:
            return 0, 1
        if self.sizes[1:] != self.shape[1:]:
            return None
        width = math.prod(self.shape[1:])
        return self.offset[0] * width, (self.offset[0] + self.sizes[0]) * width

    def of(self, whole: Tensor) -> Tensor:
        """The same block of another tensor of that shape, a view."""
        if not math.prod(self.sizes):
            return whole.reshape(-1)[:0].reshape(self.sizes)
        for dimension, (start, length) in enumerate(zip(self.offset, self.sizes, strict=True)):
            whole = whole.narrow(dimension, start, length)
        return whole

    def places(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Which elements of the whole tensor lie in the block, and where in it, both in row-major order.

        Args:
            flat: Elements of the whole tensor, int64.

        Returns:
            A mask over ``flat``, and for those inside their number in the block.

        >>> Held((4, 3), (2, 0), (2, 3)).places(torch.tensor([0, 6, 11]))
        (tensor([False,  True,  True]), tensor([0, 5]))
        """
        inside, own, rest = torch.ones_like(flat, dtype=torch.bool), torch.zeros_like(flat), flat
        width = 1
        for size, start, length in zip(*map(reversed, (self.shape, self.offset, self.sizes)), strict=True):
            index, rest = rest % size - start, rest // size
            inside &= (index >= 0) & (index < length)
            own += index * width
            width *= length
        return inside, own[inside]

    def read(self, source: WeightSource, name: str) -> Tensor:
        """The same block of a stored tensor, reading no more than it where it is one range."""
        if self.span is None:
            return self.of(source.read(name))
        return source.read_flat(name, *self.span).reshape(self.sizes)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank may hold a part only."""
    # Its module takes long to import, and no DTensor exists before someone did.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Tensor) -> Held:
    """What this rank holds of a tensor."""
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Held(shape, (0,) * len(shape), shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("Any", tensor)
    sizes, offset = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    return Held(shape, tuple(offset), tuple(sizes))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds, detached and sharing memory: writing to it writes to the tensor."""
    value = tensor.detach()
    return cast("Any", value).to_local() if is_sharded(value) else value


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached. A collective over the ranks that share it, which all call it."""
    value = tensor.detach()
    return cast("Any", value).full_tensor() if is_sharded(value) else value


def placed_like(tensor: Tensor, block: Tensor) -> Tensor:
    """A tensor that is laid out over ranks as another one, and of which this rank holds ``block``."""
    if not is_sharded(tensor):
        return block
    from torch.distributed.tensor import DTensor

    placed = cast("Any", tensor.detach())
    return cast(
        "Tensor",
        DTensor.from_local(
            block.contiguous(),
            placed.device_mesh,
            placed.placements,
            run_check=False,
            shape=placed.shape,
            stride=placed.stride(),
        ),
    )


def copies(tensor: Tensor, ranks: int) -> float:
    """How many of ``ranks`` ranks hold each element of a tensor."""
    if not is_sharded(tensor):
        return ranks
    placed = cast("Any", tensor.detach())
    mesh, placements = placed.device_mesh, placed.placements
    inside: int = math.prod(mesh.size(i) for i, place in enumerate(placements) if place.is_replicate())
    return float(inside * ranks / mesh.size())


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its shards and nothing else.

    After a pass without gradients some modules keep their gathered parameters: a write to the shards would not be
    seen by the next pass, and a pass after the shards were put back would still compute with what was written.
    Also, parameters that are looked up would be the gathered ones.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


def forget_pass(model: nn.Module) -> None:
    """After a pass that raised, let FSDP2 begin anew: else ``reshard`` does nothing for modules that it was inside of.

    They would go on computing with what they had gathered, whatever their shards become. Gradients of the pass that
    failed are lost.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    inner: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, module.FSDPModule) and part not in inner:
            inner.update(part.modules())
            if not hasattr(part, "reset_iter_state"):
                logger.warning(
                    "FSDP2 of torch %s cannot begin anew after a pass that raised: end this run, and resume "
                    "it from its last checkpoint",
                    torch.__version__,
                )
                return
            cast("Any", part).reset_iter_state()


def require_readable(model: nn.Module) -> None:
    """Raise if a model keeps its parameters where they can be neither read nor replaced exactly.

    Raises:
        UnsupportedError: For FSDP1, for DeepSpeed ZeRO-3, and for parameters on the meta device.
    """
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise UnsupportedError(
            "FSDP1 flattens parameters, so single ones cannot be read. Use FSDP2: `fully_shard`, or fsdp_version 2 in "
            "accelerate's and transformers' configuration, or ModelParallelStrategy in Lightning."
        )
    names = dict(model.named_parameters())
    if any(hasattr(parameter, "ds_id") for parameter in names.values()):
        raise UnsupportedError(
            "DeepSpeed ZeRO-3 partitions parameters, so they cannot be read here. Use ZeRO-2, or FSDP2."
        )
    empty = [name for name, parameter in names.items() if parameter.device.type == "meta"]
    if empty:
        raise UnsupportedError(
            f"parameters without values (on the meta device): {listing(empty, 4)}. Offloading is not supported; "
            "load the model onto the device that trains it."
        )
