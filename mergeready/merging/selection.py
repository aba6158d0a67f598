"""Exact order statistics of |τ| without sorting: a sample brackets the border, one pass counts and looks closely."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import FormatError
from mergeready.merging.largest import border
from mergeready.weights.source import TensorInfo, chunk_ranges

Read: TypeAlias = Callable[[int, int], Tensor]
"""Gives elements ``start`` to ``stop`` as a 1-D fp32 tensor."""

Bits: TypeAlias = NDArray[np.int32]
"""Bit patterns of magnitudes: integers that are ordered as the magnitudes are, with NaN above infinity."""

_BLOCK = 512  # elements read at one place for the sample
_BLOCKS = (8, 1024)
_SIGMAS = 5.0
_MOST = 2**22  # entries between the brackets that are kept: 16 MiB
_HELD_COPIES = 4  # of a tensor that is looked at as a whole
_ALL_BITS = 2**31 - 1


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
        magnitude, border = chunk.abs(), self._border(chunk, start)
        return torch.cat([magnitude[:border] >= self.value, magnitude[border:] > self.value])

    def trim(self, chunk: Tensor, start: int) -> Tensor:
        """Put zeros in place of all entries but the k largest, in place; NaN stay NaN, so that engines see them."""
        return self._trim(chunk, start, chunk)

    def trimmed(self, chunk: Tensor, start: int) -> Tensor:
        """As :meth:`trim`, a new tensor."""
        return self._trim(chunk, start, torch.empty_like(chunk))

    def _trim(self, chunk: Tensor, start: int, out: Tensor) -> Tensor:
        border = self._border(chunk, start)
        for part, most in ((slice(border), _next_below(self.value)), (slice(border, None), self.value)):
            torch.hardshrink(chunk[part], math.inf if math.isnan(most) else most, out=out[part])
        return out

    def _border(self, chunk: Tensor, start: int) -> int:
        return max(0, min(len(chunk), self.last_index + 1 - start))


def _next_below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(0)))


def kept_count(density: float, numel: int) -> int:
    """How many entries a density keeps: ⌊density · n⌋, at least one.

    >>> kept_count(0.29, 100), kept_count(0.001, 10)
    (29, 1)
    """
    return max(1, min(numel, math.floor(density * numel + 1e-9)))


def top_k(read: Read, info: TensorInfo, count: int) -> TopK:
    """Find the ``count`` entries of largest magnitude; see :func:`top_ks`."""
    return top_ks(read, info, [count])[0]


def top_ks(read: Read, info: TensorInfo, counts: Sequence[int]) -> list[TopK]:
    """Find the entries of largest magnitude, for several counts in the same pass over the chunks of a tensor.

    Equal to what a full stable sort by falling magnitude would give. NaN count as largest but are never chosen: they
    stay NaN where others become zero, and the engines refuse them by name.

    A tensor that can be held is looked at as a whole. Of others a sample of blocks tells between which two values
    each border lies, up to five standard errors between blocks. One pass then counts what lies above and keeps what
    lies between, where the border is found exactly. If the sample misled, passes of histograms find it in any case.
    """
    if can_be_held(info, _HELD_COPIES):
        bits = np.empty(info.numel, np.int32)
        for start, piece in _chunks(read, info):
            bits[start : start + len(piece)] = piece
        return [_top_k(*border(bits, count)) for count in counts]
    sample = _sample(read, info.numel)
    brackets = [_Bracket.around(sample, count / info.numel) for count in counts]
    for start, bits in _chunks(read, info):
        for bracket in brackets:
            bracket.add(start, bits)
    found = [bracket.find(read, count) for bracket, count in zip(brackets, counts, strict=True)]
    return [
        _in_any_case(read, info, count) if chosen is None else chosen
        for chosen, count in zip(found, counts, strict=True)
    ]


def can_be_held(info: TensorInfo, copies: int = 1) -> bool:
    """Whether fp32 values of a tensor are few enough to be kept in memory instead of being computed again.

    >>> can_be_held(TensorInfo((1024, 1024), torch.float32)), can_be_held(TensorInfo((32000, 4096), torch.float32))
    (True, False)
    """
    return copies * info.numel <= _MOST


def selection_bytes(info: TensorInfo, counts: int = 1) -> int:
    """Most memory in bytes that :func:`top_ks` takes, beside one chunk."""
    held = 6 * 4 * info.numel if can_be_held(info, _HELD_COPIES) else 0  # magnitudes, positions of candidates
    return max(held, 4 * counts * min(info.numel, _MOST))


def _bits(chunk: Tensor) -> Bits:
    return chunk.cpu().contiguous().numpy().view(np.int32) & np.int32(0x7FFFFFFF)


def _chunks(read: Read, info: TensorInfo) -> Iterator[tuple[int, Bits]]:
    for start, stop in chunk_ranges(info):
        yield start, _bits(read(start, stop))


def _sample(read: Read, numel: int) -> Bits:
    """Blocks that are spread evenly over a tensor, one a row."""
    least, most = _BLOCKS
    count = max(least, min(most, numel // 2**17))
    starts = [(numel - _BLOCK) * i // (count - 1) for i in range(count)]
    return np.stack([_bits(read(start, start + _BLOCK)) for start in starts])


def _kth(
    pieces: Callable[[], Iterable[Bits]], low: int, high: int, count: int, width: int = 12
) -> tuple[int, int]:
    """The ``count``-th largest value between two bounds, and the how-manieth of the entries equal to it that is.

    Narrows the bounds to one of 2^width parts after each pass. Does not slow down where many values are equal, as
    partitioning does.
    """
    while low < high:
        shift = max(0, (high - low).bit_length() - width)
        histogram = np.zeros(((high - low) >> shift) + 1, dtype=np.int64)
        for bits in pieces():
            inside = (bits >= low) & (bits <= high)
            bins = (bits.take(np.flatnonzero(inside)) - np.int32(low)) >> shift
            histogram += np.bincount(bins, minlength=len(histogram))
        above = histogram[::-1].cumsum()[::-1]  # entries in this part and in all larger ones
        part = int(np.flatnonzero(above >= count)[-1])
        count -= int(above[part] - histogram[part])
        low += part << shift
        high = min(high, low + (1 << shift) - 1)
    return low, count


def _top_k(value: int, last_index: int) -> TopK:
    number = float(np.int32(value).view(np.float32))
    return TopK(number, -1 if math.isnan(number) else last_index)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of elements ``start`` to ``stop``: how many equal each bracket, and the values between the two."""

    start: int
    stop: int
    at_high: int
    at_low: int
    between: Bits

    def count(self, value: int, low: int, high: int) -> int:
        """How many equal a value."""
        if value in (low, high):
            return self.at_high if value == high else self.at_low
        return int(np.count_nonzero(self.between == value))


@dataclass
class _Bracket:
    """Counts entries above and at ``high`` and at ``low``, and keeps those between.

    Differences of 16-bit weights take few values, each of them many times, and brackets are values: most of
    what does not lie outside is at one of them, and counting is much cheaper than keeping.
    """

    low: int
    high: int
    above: int = 0
    kept: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    @classmethod
    def around(cls, sample: Bits, share: float) -> _Bracket:
        """Between which values the border below the largest ``share`` lies, by a sample of blocks."""
        ordered = np.sort(sample, axis=None)[::-1]
        size = len(ordered)
        shares = np.mean(sample >= ordered[min(size - 1, round(share * size))], axis=1)
        # Blocks differ more than coins where rows differ, and may by chance all agree where they do not.
        error = max(float(shares.std()) / len(shares) ** 0.5, (share * (1 - share) / size) ** 0.5)
        margin = _SIGMAS * error + 1 / size
        first, last = math.floor((share - margin) * size), math.ceil((share + margin) * size)
        high = int(ordered[first]) if first >= 0 else _ALL_BITS
        return cls(int(ordered[last]) if last < size else 0, high)

    def add(self, start: int, bits: Bits) -> None:
        above, from_high = int(np.count_nonzero(bits > self.high)), bits >= self.high
        inside = bits > self.low
        at_high, above_low = int(np.count_nonzero(from_high)) - above, int(np.count_nonzero(inside))
        at_low = int(np.count_nonzero(bits >= self.low)) - above_low if self.low < self.high else 0
        inside &= ~from_high
        self.above += above
        self.kept += max(above_low - above - at_high, 0)
        keep = self.low < self.high and self.kept <= _MOST
        between = bits.take(np.flatnonzero(inside)) if keep else bits[:0].copy()
        self.pieces.append(_Piece(start, start + len(bits), at_high, at_low, between))

    def find(self, read: Read, count: int) -> TopK | None:
        """The ``count`` largest entries; None where the border lies outside, or too much lies inside."""
        needed = count - self.above
        at_high, at_low = (
            sum(piece.at_high for piece in self.pieces),
            sum(piece.at_low for piece in self.pieces),
        )
        if not 0 < needed <= at_high + self.kept + at_low or self.kept > _MOST:
            return None
        value = self.high
        if needed > at_high + self.kept:
            value, needed = self.low, needed - at_high - self.kept
        elif needed > at_high:
            between = [piece.between for piece in self.pieces]
            value, needed = _kth(lambda: between, self.low, self.high, needed - at_high)
        for piece in self.pieces:
            equal = piece.count(value, self.low, self.high)
            if needed <= equal:
                return _top_k(value, _place(_bits(read(piece.start, piece.stop)), piece.start, value, needed))
            needed -= equal
        return None


def _place(bits: Bits, start: int, value: int, needed: int) -> int:
    """Index of the ``needed``-th entry of a chunk that equals ``value``."""
    return start + int(np.flatnonzero(bits == value)[needed - 1])


def _in_any_case(read: Read, info: TensorInfo, count: int) -> TopK:
    value, needed = _kth(lambda: (bits for _, bits in _chunks(read, info)), 0, _ALL_BITS, count, width=16)
    for start, bits in _chunks(read, info):
        equal = int(np.count_nonzero(bits == value))
        if needed <= equal:
            return _top_k(value, _place(bits, start, value, needed))
        needed -= equal
    raise FormatError("values changed while the largest were being found.")
