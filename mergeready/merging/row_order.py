"""The columns of each row by rising magnitude, exactly, at the speed of integer sorts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Positions: TypeAlias = NDArray[np.int64]
"""Places in the order, row after row, where a key equals the one before as far as the two can tell."""

_MAGNITUDE_BITS = 31
_MANTISSA_BITS = 23
_OCTAVES = 16  # powers of two below the largest value that keys tell apart
_WINDOW_BITS = _MANTISSA_BITS + 4
_BLOCK = (
    512  # integers that numpy sorts without a branch, at a fraction of the time per integer of longer rows
)
_SHORT = 2048  # columns up to which sorting is as fast as counting (measured)
_FEW = 1 / 32  # share of magnitudes that may have more digits than a key
_PROBE = 4096  # elements that tell whether there are few
_SIGN = -(2**31)


def row_order(values: Tensor) -> Tensor:
    """For each row of an fp32 matrix, its columns by rising |x|; among equals the first column comes first.

    Equal to a stable argsort of |x| along the rows, with NaN last. Keys of 15 or more bits hold the upper bits of |x|,
    and one bit more whether lower ones were cut off. Keys that are equal are in order already, unless something was
    cut off; those few are sorted once more with all bits. Integers of 32 bits with the column in them sort several
    times faster than pairs of a value and an index. Differences of 16-bit weights have few bits: their keys are made at
    little cost, and sorted in blocks that a sorting network merges or, in long rows, by numpy's stable sort of 16-bit
    keys, which counts instead of comparing.

    Args:
        values: Shape (rows, columns).

    Returns:
        Column numbers, int64, on the CPU, of the same shape.

    Example:
        >>> row_order(torch.tensor([[3.0, -1.0, 1.0], [0.0, 5.0, -4.0]]))
        tensor([[1, 2, 0],
                [0, 2, 1]])
    """
    if not values.numel():
        return torch.empty(values.shape, dtype=torch.int64)
    raw = values.detach().cpu().contiguous().view(torch.int32)
    columns = raw.shape[1]
    width = max(1, (columns - 1).bit_length())
    if columns <= _SHORT and _is_coarse(raw, width):
        order, unsure = _merge(raw, width)
    else:
        order, unsure = _count_or_sort(_magnitudes(raw), width)
    if len(unsure):
        _sort_fully(order, unsure, _magnitudes(raw), width)
    return torch.from_numpy(order)


def _magnitudes(raw: Tensor) -> NDArray[np.uint32]:
    return raw.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)


def _is_coarse(raw: Tensor, width: int) -> bool:
    """Whether nearly all magnitudes have no digits in their last ``width`` bits, by looking at some."""
    probe = raw.reshape(-1)[:: max(1, raw.numel() // _PROBE)] & ((1 << width) - 1)
    return int(torch.count_nonzero(probe)) <= _FEW * len(probe)


def _merge(raw: Tensor, width: int) -> tuple[NDArray[np.int64], Positions]:
    """The order by blocks of columns, and places in it where keys do not tell neighbours apart."""
    rows, columns = raw.shape
    count = -(-columns // _BLOCK)
    size = -(-columns // count)
    parts = [slice(first, min(first + size, columns)) for first in range(0, columns, size)]
    keys, doubtful = _short_keys(raw, width)
    blocks = []
    for part, flipped in zip(parts, _flipped(count), strict=True):
        flip = (
            ~_SIGN if flipped else _SIGN
        )  # the lowest bit pattern becomes the lowest, or the highest, integer
        block = torch.empty(rows, size, dtype=torch.int32)
        tags = torch.arange(part.start, part.stop, dtype=torch.int32) ^ flip
        torch.bitwise_xor(keys[:, part], tags, out=block[:, : len(tags)])
        block[:, len(tags) :] = ~flip  # behind the last column
        blocks.append(block)
    blocks = _sorted(blocks)

    order = torch.empty(rows, columns, dtype=torch.int64)
    for part, block in zip(parts, blocks, strict=True):
        order[:, part] = block[:, : part.stop - part.start] & ((1 << width) - 1)
    if not len(doubtful):
        return order.numpy(), doubtful
    where = torch.from_numpy(doubtful)
    unsure = _unsure(torch.cat([block[where] for block in blocks], 1)[:, :columns], width)
    return order.numpy(), unsure + (doubtful[unsure // columns] - unsure // columns) * columns


def _short_keys(raw: Tensor, width: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Keys of 32 bits, the last ``width`` of them free, and the rows where unequal elements may have equal ones."""
    low = (1 << width) - 1
    keys = raw << 1
    cut = np.flatnonzero((raw & low).bool().numpy())
    flat = keys.reshape(-1).numpy()
    flat[cut] &= ~np.int32(2 * low + 1)
    flat[cut] |= np.int32(low + 1)
    rows_and_keys = np.sort(cut // raw.shape[1] << 32 | flat[cut].view(np.uint32))
    return keys, np.unique(rows_and_keys[1:][rows_and_keys[1:] == rows_and_keys[:-1]] >> 32)


def _flipped(count: int, flipped: bool = False) -> list[bool]:
    """Which blocks are sorted by falling keys first, so that two sorted lists of blocks rise and fall as one."""
    half = count // 2
    return [flipped] if count == 1 else _flipped(half, not flipped) + _flipped(count - half, flipped)


def _sorted(blocks: list[Tensor]) -> list[Tensor]:
    """Blocks of columns such that each row rises from the first block to the last.

    Bitonic merging (Batcher, "Sorting networks and their applications", 1968): a list that falls and one that rises
    are compared block by block at falling distances, after which no element is in a wrong block.
    """
    if len(blocks) > 1:
        half = len(blocks) // 2
        falling = [block.bitwise_not_() for block in _sorted(blocks[:half])]
        blocks = falling + _sorted(blocks[half:])
        for lower, upper in _comparisons(0, len(blocks)):
            least = torch.minimum(blocks[lower], blocks[upper])
            torch.maximum(blocks[lower], blocks[upper], out=blocks[upper])
            blocks[lower] = least
    for block in blocks:
        block.numpy().sort(axis=1)
    return blocks


def _comparisons(first: int, count: int) -> Iterator[tuple[int, int]]:
    """Pairs of blocks to compare, in order, for any number of blocks."""
    if count > 1:
        distance = 1 << ((count - 1).bit_length() - 1)
        for lower in range(first, first + count - distance):
            yield lower, lower + distance
        yield from _comparisons(first, distance)
        yield from _comparisons(first + distance, count - distance)


def _unsure(ordered: Tensor, width: int) -> Positions:
    """Where a key equals the one before, and its last bit tells that something was cut off."""
    last = np.int32(1 << width)
    equal = ordered[:, 1:] ^ ordered[:, :-1]
    places = _places((equal.bitwise_right_shift_(width) == 0).numpy())
    cut: NDArray[np.bool_] = ordered.reshape(-1).numpy()[places] & last != 0
    return places[cut]


def _count_or_sort(bits: NDArray[np.uint32], width: int) -> tuple[NDArray[np.int64], Positions]:
    """As :func:`_merge`, for many columns or bits."""
    keys = _keys(bits, 16) if bits.shape[1] > _SHORT else None
    if keys is not None and np.count_nonzero(keys & np.uint32(1)) <= _FEW * keys.size:
        return _count(keys.astype(np.uint16))
    return _sort(_keys(bits, 32 - width), width)


def _count(keys: NDArray[np.uint16]) -> tuple[NDArray[np.int64], Positions]:
    """As :func:`_merge`, of 16-bit keys."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = torch.from_numpy(keys.view(np.int16)).gather(1, torch.from_numpy(order)).numpy()
    unsure = ordered[:, 1:] == ordered[:, :-1]
    unsure &= (ordered[:, 1:] & np.int16(1)).astype(np.bool_)
    return order, _places(unsure)


def _sort(keys: NDArray[np.uint32], width: int) -> tuple[NDArray[np.int64], Positions]:
    """As :func:`_merge`, of keys of ``32 - width`` bits."""
    keys <<= np.uint32(width)
    keys |= np.arange(keys.shape[1], dtype=np.uint32)
    keys.sort(axis=1)
    column = np.uint32((1 << width) - 1)
    unsure = (keys[:, 1:] ^ keys[:, :-1]) <= column
    unsure &= (keys[:, 1:] & np.uint32(1 << width)) != 0
    return (keys & column).astype(np.int64), _places(unsure)


def _places(unsure: NDArray[np.bool_]) -> Positions:
    """Places in rows, where ``unsure`` tells it of all but the first column."""
    places = np.flatnonzero(unsure)
    places += places // unsure.shape[1] + 1
    return places


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


def _sort_fully(order: NDArray[np.int64], unsure: Positions, bits: NDArray[np.uint32], width: int) -> None:
    """Put neighbours whose keys did not tell them apart into order, in place.

    They form runs that lie in order already, so that all of them can be sorted at once.
    """
    columns = order.shape[1]
    concerned = np.zeros(order.size, dtype=bool)
    concerned[unsure] = concerned[unsure - 1] = True
    positions = np.flatnonzero(concerned)
    row = positions // columns
    column = order.reshape(-1)[positions]
    full = (row.astype(np.uint64) << np.uint64(_MAGNITUDE_BITS)) | bits.reshape(-1)[row * columns + column]
    full <<= np.uint64(width)
    full |= column.astype(np.uint64)
    full.sort()
    order.reshape(-1)[positions] = full & np.uint64((1 << width) - 1)
