from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from mergeready.errors import UnsupportedError
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import held, is_sharded, local, whole
from mergeready.weights.source import TensorInfo, WeightSource

Finer: TypeAlias = Sequence[Tensor]
"""Tensors of one shape whose sum in fp32 is a finer copy of a weight: a master copy, or a weight and what rounding it
left over."""


class LiveSource(WeightSource):
    """Tensors that live in a model; each read sees the values of that moment.

    Of a sharded tensor (DTensor) a rank can read what it holds; all of it inside ``gathered`` and ``gathering``. Finer
    copies that the training keeps of tensors are read in their place once ``refine`` has found them.

    Args:
        tensors: Names to tensors. One that occurs under several names is tied, and listed under the first.
        label: How messages call the source.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            canonical = first.setdefault(id(tensor), name)
            if canonical == name:
                self._tensors[name] = tensor
            else:
                self._aliases[name] = canonical
        self._infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self._held = {name: held(t) for name, t in self._tensors.items() if is_sharded(t)}
        self._finer: dict[str, Finer] = {}
        self._gathered: dict[str, Tensor] = {}
        self._gathering = False
        self._last: tuple[str, Tensor] | None = None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    @property
    def is_sharded(self) -> bool:
        """Whether any of the tensors is."""
        return bool(self._held)

    def precision(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._finer else self._infos[name].dtype

    def refine(self, find: Callable[[str, Tensor], Finer | None], ranks: Ranks) -> None:
        """Look for finer copies of all tensors; reads give their fp32 values from now on, until the next call.

        A copy that some rank does not find is left alone by all, as gathering it takes all of them.

        Args:
            find: Given a name and its tensor, the finer copy, laid out as the tensor is; None where there is none.
            ranks: The processes that take part; a collective where there are several.
        """
        found = {name: find(name, tensor) for name, tensor in self._tensors.items()}
        finer = {name: copy for name, copy in found.items() if copy is not None}
        everywhere = set(finer).intersection(*ranks.each(set(finer)))
        self._finer = {name: copy for name, copy in finer.items() if name in everywhere}

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._gathered:
            return self._gathered[name].reshape(-1)[start:stop]
        if name not in self._held:
            return self._finest(name, start, stop)
        if self._gathering:
            return self._gather(name).reshape(-1)[start:stop]
        span = self._held[name].span
        if span is None or not span[0] <= start <= stop <= span[1]:
            raise UnsupportedError(
                f"elements {start} to {stop} of {name} lie on other ranks, and cannot be read alone. Where a live base "
                "is sharded, pass `base`: its folder or hub id."
            )
        return self._finest(name, start - span[0], stop - span[0])

    def pick(self, name: str, places: Tensor) -> Tensor:
        """Single elements of what this rank holds of a tensor, fp32, on its device; nothing else is read.

        Args:
            name: The tensor.
            places: Their numbers in row-major order of the block that this rank holds, int64, on that device.
        """
        return _sum([_picked(local(tensor), places) for tensor in self._copies(name)]).float()

    def _finest(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of what this rank holds."""
        return _sum([local(tensor).reshape(-1)[start:stop] for tensor in self._copies(name)])

    def _whole(self, name: str) -> Tensor:
        return _sum([whole(tensor) for tensor in self._copies(name)])

    def _copies(self, name: str) -> Finer:
        return self._finer.get(name) or [self._tensors[name]]

    @contextmanager
    def gathered(self, names: Iterable[str]) -> Iterator[None]:
        """Hold tensors whole on every rank inside the block. A collective of all ranks where they are sharded."""
        before = self._gathered
        added = {name: self._whole(name) for name in names if name in self._held}
        self._gathered = before | added
        try:
            yield
        finally:
            self._gathered = before

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside the block every tensor can be read; each is gathered as it is read, and kept until the next one.

        Where they are sharded, all ranks have to read the same tensors in the same order.
        """
        self._gathering, before = True, self._gathering
        try:
            yield
        finally:
            self._gathering, self._last = before, None

    def _gather(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self._whole(name)
        return self._last[1]


def _picked(block: Tensor, places: Tensor) -> Tensor:
    if block.is_contiguous():
        return block.view(-1).index_select(0, places)
    return block[torch.unravel_index(places, block.shape)]  # not all of it laid out anew


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in fp32; a single tensor as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack([tensor.float() for tensor in tensors]).sum(0)
