"""Exact order statistics of |τ| without sorting: a histogram of bit patterns, then one bin looked at closely."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo, chunk_ranges

_SHIFT = 15  # of the 31 bits of |x|, the upper 16 make the bin: exponent and eight bits of mantissa
_BINS = 1 << 16

Read = Callable[[int, int], Tensor]
"""Gives elements ``start`` to ``stop`` as a 1-D fp32 tensor."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The k entries of largest magnitude: those above ``value``, and those equal to it up to ``last_index``.

    Among equal magnitudes the ones that come first are taken, so that exactly k entries are chosen, and the
    same ones however the tensor is cut into pieces.
    """

    value: float
    last_index: int

    def mask(self, chunk: Tensor, start: int) -> Tensor:
        """Which entries of a chunk that begins at element ``start`` belong to the k largest."""
        magnitude = chunk.abs()
        mask = magnitude > self.value
        ties = (magnitude == self.value).nonzero().flatten()
        if len(ties):
            mask[ties[ties + start <= self.last_index]] = True
        return mask


def kept_count(density: float, numel: int) -> int:
    """How many entries a density keeps: ⌊density · n⌋, at least one.

    >>> kept_count(0.29, 100), kept_count(0.001, 10)
    (29, 1)
    """
    return max(1, min(numel, math.floor(density * numel + 1e-9)))


def top_k(read: Read, info: TensorInfo, count: int) -> TopK:
    """Find the ``count`` entries of largest magnitude in two passes over the chunks of a tensor.

    Equal to what a full stable sort by falling magnitude would give. NaN count as largest but are never chosen: they
    stay NaN where others become zero, and the engines refuse them by name.
    """
    if info.numel <= CHUNK_ELEMENTS:
        magnitude = read(0, info.numel).abs().cpu()
        value = torch.kthvalue(magnitude, info.numel - count + 1).values
        return _break_ties(magnitude, torch.arange(info.numel), float(value), count)
    histogram = np.zeros(_BINS, dtype=np.int64)
    for start, stop in chunk_ranges(info):
        histogram += torch.bincount(_bins(read(start, stop)), minlength=_BINS).cpu().numpy()
    above = histogram[::-1].cumsum()[::-1]  # entries in this bin and in all larger ones
    chosen = int(np.flatnonzero(above >= count)[-1])
    needed = count - int(above[chosen] - histogram[chosen])
    values, indices = _entries_in_bin(read, info, chosen)
    value = torch.kthvalue(values, len(values) - needed + 1).values
    return _break_ties(values, indices, float(value), needed)


def _break_ties(values: Tensor, indices: Tensor, value: float, count: int) -> TopK:
    """Of entries equal to the border value, as many as are still needed, the first ones."""
    if math.isnan(value):
        return TopK(value, -1)
    equal = indices[values == value]
    needed = count - int((~(values <= value)).sum())
    return TopK(value, int(equal[needed - 1]))


def _bins(chunk: Tensor) -> Tensor:
    return (chunk.contiguous().view(torch.int32) & 0x7FFFFFFF) >> _SHIFT


def _entries_in_bin(read: Read, info: TensorInfo, chosen: int) -> tuple[Tensor, Tensor]:
    values, indices = [], []
    for start, stop in chunk_ranges(info):
        chunk = read(start, stop)
        found = (_bins(chunk) == chosen).nonzero().flatten()
        values.append(chunk[found].abs().cpu())
        indices.append(found.cpu() + start)
    return torch.cat(values), torch.cat(indices)
