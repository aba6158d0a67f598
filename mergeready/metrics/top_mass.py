from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.metrics.stream import Accumulator, Chunk

_SHIFT = 13  # bins are the upper 18 bits of |x|: exponent and ten bits of mantissa, 0.1 % wide
_BINS = 1 << 18
_OCTAVES = 1 << 8


class TopMassAccumulator(Accumulator):
    """Share of ‖τ‖² that sits in the entries of largest magnitude.

    Near the share of entries for a flat task vector, near 1 for a sparse one; says what trimming costs. Entries are
    counted and summed in bins 0.1 % wide, and a bin is split evenly where the border falls into it, which misplaces
    a 2000th of that bin's mass at most: the result is exact to 1e-6 unless a bin holds over 0.2 % of the mass.

    Args:
        expert: Position of the task vector among those in a chunk.
    """

    def __init__(self, expert: int = 0) -> None:
        self._expert = expert
        self.sums = torch.zeros(2, _BINS, dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        values = chunk.deltas[self._expert].contiguous().cpu()
        bins = (values.view(torch.int32) & 0x7FFFFFFF) >> _SHIFT
        self.sums[0].index_add_(0, bins, torch.ones(1, dtype=torch.float64).expand(len(bins)))
        self.sums[1].index_add_(0, bins, values.double().square_())

    def add_up(self, add: Callable[[Sequence[Tensor]], None], shares: Iterable[float]) -> None:
        """Make this the sum of several processes' accumulators, as far as some shares need it.

        The bins are four megabytes, and all but those around the borders matter by their sums alone. So octaves are
        added up first, 4 KB, then the bins of those octaves that a border falls into.

        Args:
            add: Replaces tensors by their sums over all processes.
            shares: What ``share`` will be asked for.
        """
        bins = self.sums.view(2, _OCTAVES, -1)
        octaves = bins.sum(2)
        add([octaves])
        needed = sorted({_border(octaves.flip(1)[0], share) for share in shares})
        inside = bins[:, [_OCTAVES - 1 - octave for octave in needed]].clone()
        add([inside])
        bins.zero_()
        bins[:, :, 0] = octaves
        bins[:, [_OCTAVES - 1 - octave for octave in needed]] = inside

    def share(self, top: float) -> float:
        """Share of the squared norm in the ``top`` share of entries, such as 0.01; NaN for a zero vector.

        Raises:
            OptionError: If ``top`` is outside (0, 1].
        """
        if not 0 < top <= 1:
            raise OptionError(f"`top` must be in (0, 1], not {top}.")
        counts, mass = self.sums.flip(1)
        total = float(mass.sum())
        if total == 0:
            return math.nan
        border = _border(counts, top)
        part = (top * float(counts.sum()) - float(counts[:border].sum())) / float(counts[border])
        return float(mass[:border].sum() + part * mass[border]) / total


def _border(counts: Tensor, top: float) -> int:
    """The first bin, from the largest entries down, at which the ``top`` share of entries is reached."""
    wanted = top * float(counts.sum())
    return int((counts.cumsum(0) >= wanted - 1e-9).nonzero().min())
