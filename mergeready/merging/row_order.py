"""The columns of each row by rising magnitude, exactly, at the speed of integer sorts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAGNITUDE_BITS = 31
_MANTISSA_BITS = 23
_OCTAVES = 16  # powers of two below the largest value that keys tell apart
_WINDOW_BITS = _MANTISSA_BITS + 4
_SHORT = 2048  # columns up to which sorting is as fast as counting (measured)
_FEW = 1 / 32  # share of magnitudes that may not fit into 15 bits


def row_order(values: Tensor) -> Tensor:
    """For each row of an fp32 matrix, its columns by rising |x|; among equals the first column comes first.

    Equal to a stable argsort of |x| along the rows, with NaN last. Keys of 15 or more bits hold the upper bits of |x|,
    and one bit more whether lower ones were cut off. Keys that are equal are in order already, unless something was
    cut off; those few are sorted once more with all bits. Differences of 16-bit weights nearly always fit into
    15 bits, for which numpy's stable sort counts instead of comparing. Otherwise keys have 32 bits with the column in
    them: integers sort several times faster than pairs of a value and an index.

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
    keys = _keys(bits, 16) if columns > _SHORT else None
    if keys is not None and np.count_nonzero(keys & np.uint32(1)) <= _FEW * keys.size:
        order, unsure = _count(keys.astype(np.uint16))
    else:
        order, unsure = _sort(_keys(bits, 32 - width), width)
    if unsure.any():
        _sort_fully(order, unsure, bits, width)
    return torch.from_numpy(order)


def _count(keys: NDArray[np.uint16]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The stable order of 16-bit keys, and which entries in it equal the one before as far as their keys can tell."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = torch.from_numpy(keys.view(np.int16)).gather(1, torch.from_numpy(order)).numpy()
    unsure = ordered[:, 1:] == ordered[:, :-1]
    unsure &= (ordered[:, 1:] & np.int16(1)).astype(np.bool_)
    return order, unsure


def _sort(keys: NDArray[np.uint32], width: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """As :func:`_count` of keys of ``32 - width`` bits."""
    keys <<= np.uint32(width)
    keys |= np.arange(keys.shape[1], dtype=np.uint32)
    keys.sort(axis=1)
    column = np.uint32((1 << width) - 1)
    unsure = (keys[:, 1:] ^ keys[:, :-1]) <= column
    unsure &= (keys[:, 1:] & np.uint32(1 << width)) != 0
    return (keys & column).astype(np.int64), unsure


def _keys(bits: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """Integers of ``size`` bits: the upper bits of each magnitude and, in the last, whether something was cut off."""
    exponent = int(bits.max(initial=0)) >> _MANTISSA_BITS
    lowest = np.uint32(max(exponent + 1 - _OCTAVES, 0) << _MANTISSA_BITS)
    cut = max(_WINDOW_BITS + 1 - size, 0)
    keys: NDArray[np.uint32] = np.maximum(bits, lowest)
    keys -= lowest
    inexact = keys & np.uint32((1 << cut) - 1)
    np.minimum(inexact, np.uint32(1), out=inexact)
    if lowest:  # all that is smaller, but not 0, shares the lowest key
        inexact |= (bits - np.uint32(1) < lowest).astype(np.uint32)
    keys >>= np.uint32(cut)
    keys <<= np.uint32(1)
    keys |= inexact
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
