from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**18
"""Elements per chunk: 1 MiB of fp32, small enough for a core's cache and for accurate fp32 sums."""

_STATISTIC_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one stored tensor, known without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the stored values in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class WeightSource(ABC):
    """Named tensors that are read lazily, whole or in part.

    The one interface over safetensors folders, state dicts and live modules. Names are the source's own.
    Reading never casts: values arrive in the stored dtype, on the device where they live.
    """

    label: str
    """How messages call this source: a path, a hub id, or a description."""

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, in stored order, each tied group under one name only."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of tied tensors, each mapped to the name under which the tensor is listed."""
        return {}

    @property
    def stored_names(self) -> Mapping[str, str]:
        """What files call tensors that a model in memory calls otherwise, each mapped to the name listed here."""
        return {}

    @property
    def other_names(self) -> Mapping[str, str]:
        """Every other name of a tensor, in files or tied, mapped to the name listed here."""
        return {**self.stored_names, **self.aliases}

    @abstractmethod
    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the tensor in row-major order, as a 1-D tensor.

        The result may share memory with the source: do not write to it.

        Raises:
            KeyError: If the source has no tensor ``name``.
        """

    def precision(self, name: str) -> torch.dtype:
        """The dtype that values are read in: the stored one, unless the source knows a finer copy."""
        return self.infos[name].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor in its shape."""
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension, shape ``(stop - start, *shape[1:])``."""
        info = self.infos[name]
        width = info.numel // max(info.rows, 1)
        return self.read_flat(name, start * width, stop * width).reshape(stop - start, *info.shape[1:])


def is_mergeable(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a weight that can be merged, not a counter, an index or a running statistic."""
    return info.dtype.is_floating_point and not name.endswith(_STATISTIC_SUFFIXES)


def chunk_ranges(
    info: TensorInfo, limit: int = CHUNK_ELEMENTS, span: tuple[int, int] | None = None
) -> Iterator[tuple[int, int]]:
    """Element ranges that cover a tensor, at most ``limit`` long, on row borders where rows fit.

    Args:
        info: The tensor.
        limit: Longest range.
        span: Only these elements, first and end, which should be on row borders.

    >>> list(chunk_ranges(TensorInfo((5, 3), torch.float32), limit=7))
    [(0, 6), (6, 12), (12, 15)]
    """
    width = info.numel // max(info.rows, 1)
    step = limit if width > limit or width == 0 else limit // width * width
    first, end = (0, info.numel) if span is None else span
    for start in range(first, end, step):
        yield start, min(start + step, end)


def equal(first: WeightSource, name: str, second: WeightSource, other: str) -> bool:
    """Whether two stored tensors have one shape and equal values, as values of the first one's dtype."""
    info = first.infos[name]
    return info.shape == second.infos[other].shape and all(
        torch.equal(
            first.read_flat(name, start, stop).cpu(),
            second.read_flat(other, start, stop).to(device="cpu", dtype=info.dtype),
        )
        for start, stop in chunk_ranges(info)
    )
