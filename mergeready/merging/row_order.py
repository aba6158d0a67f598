"""The columns of each row by rising magnitude, exactly, at the speed of a sort of 32-bit integers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAGNITUDE_BITS = 31
_MANTISSA_BITS = 23
_OCTAVES = 16  # powers of two below the largest value that keys tell apart
_WINDOW_BITS = _MANTISSA_BITS + 4


def row_order(values: Tensor) -> Tensor:
    """For each row of an fp32 matrix, its columns by rising |x|; among equals the first column comes first.

    Equal to a stable argsort of |x| along the rows, with NaN last. Integers sort several times faster than pairs of a
    value and an index: a 32-bit key holds the upper bits of |x|, one bit for whether lower ones were cut off, and
    the column. Keys that agree in all but the column are in order already, unless something was cut off;
    those few are sorted once more with all bits.

    Args:
        values: Shape (rows, columns).

    Returns:
        Column numbers, int64, on the CPU, of the same shape.

    Example:
        >>> row_order(torch.tensor([[3.0, -1.0, 1.0], [0.0, 5.0, -4.0]]))
        tensor([[1, 2, 0],
                [0, 2, 1]])
    """
    columns = values.shape[1]
    bits = values.detach().cpu().contiguous().numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)
    width = max(1, (columns - 1).bit_length())
    keys = _keys(bits, width)
    keys |= np.arange(columns, dtype=np.uint32)
    keys.sort(axis=1)
    column = np.uint32((1 << width) - 1)
    order = (keys & column).astype(np.int64)
    unsure = (keys[:, 1:] ^ keys[:, :-1]) <= column
    unsure &= (keys[:, 1:] & np.uint32(1 << width)) != 0
    if unsure.any():
        _sort_fully(order, unsure, bits, width)
    return torch.from_numpy(order)


def _keys(bits: NDArray[np.uint32], width: int) -> NDArray[np.uint32]:
    """The upper bits of each magnitude and whether something was cut off, with ``width`` bits free below."""
    exponent = int(bits.max(initial=0)) >> _MANTISSA_BITS
    lowest = np.uint32(max(exponent + 1 - _OCTAVES, 0) << _MANTISSA_BITS)
    cut = np.uint32(max(_WINDOW_BITS + 1 + width - 32, 0))
    keys: NDArray[np.uint32] = np.maximum(bits, lowest)
    keys -= lowest
    inexact = (keys & np.uint32((1 << int(cut)) - 1)) != 0
    if lowest:
        inexact |= (bits <= lowest) & (bits != 0)
    keys >>= cut
    keys <<= np.uint32(1)
    keys |= inexact
    keys <<= np.uint32(width)
    return keys


def _sort_fully(
    order: NDArray[np.int64], unsure: NDArray[np.bool_], bits: NDArray[np.uint32], width: int
) -> None:
    """Put neighbours whose keys did not tell them apart into order, in place.

    They form runs that lie in order already, so that all of them can be sorted at once.
    """
    rows, columns = order.shape
    concerned = np.zeros((rows, columns), dtype=bool)
    concerned[:, 1:] |= unsure
    concerned[:, :-1] |= unsure
    positions = np.flatnonzero(concerned)
    row = positions // columns
    column = order.reshape(-1)[positions]
    full = (row.astype(np.uint64) << np.uint64(_MAGNITUDE_BITS)) | bits.reshape(-1)[row * columns + column]
    full <<= np.uint64(width)
    full |= column.astype(np.uint64)
    full.sort()
    order.reshape(-1)[positions] = full & np.uint64((1 << width) - 1)
