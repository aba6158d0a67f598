from __future__ import annotations

import math

import torch
from torch import Tensor

from mergeready.metrics.stream import Accumulator, Chunk


class SignConflictAccumulator(Accumulator):
    """How often task vectors disagree in sign.

    Pairwise: the share of coordinates with opposite signs among those where both are non-zero; 0.5 by chance.
    Of all: the mean of ``1 − |Σ sign| / m`` over coordinates where m ≥ 2 experts are non-zero. Its chance level
    grows with m, from 0.5 for two to 0.73 for eight, so the normalised value divides by it: 1 is chance,
    0 full agreement.

    Args:
        count: Number of task vectors.
        first_row_only: Only pairs with the first task vector; the value of all is then left out.
    """

    def __init__(self, count: int, *, first_row_only: bool = False) -> None:
        self._count = count
        self._rows = 1 if first_row_only else count
        self._together = not first_row_only
        # Agreements minus conflicts by pair; both non-zero by pair; coordinates and conflict by m.
        self._lengths = [self._rows * count, self._rows * count, count + 1, count + 1]
        self.sums = torch.zeros(sum(self._lengths), dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        signs = torch.stack(list(chunk.deltas)).sign_()
        present = signs.abs()
        parts = [signs[: self._rows] @ signs.T, present[: self._rows] @ present.T]
        if self._together:
            nonzero = present.sum(0)
            conflict = 1 - signs.sum(0).abs() / nonzero.clamp(min=1)
            index = nonzero.long()
            length = self._count + 1
            parts.append(torch.bincount(index, minlength=length))
            parts.append(torch.bincount(index, weights=conflict.double(), minlength=length))
        else:
            parts += [torch.zeros(size) for size in self._lengths[2:]]
        self.sums += torch.cat([part.flatten().cpu().double() for part in parts])

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.split(self.sums, self._lengths)

    def pairwise(self) -> Tensor:
        """Share of conflicting coordinates by pair, float64, shape (rows, count); NaN where nothing is shared."""
        balance, both, _, _ = self._parts()
        conflicts: Tensor = (both - balance) / (2 * both)
        return conflicts.reshape(self._rows, self._count)

    def of_all(self) -> float:
        """The conflict of all task vectors together, in [0, 1); NaN where no coordinate is shared."""
        _, _, counts, conflict = self._parts()
        shared = float(counts[2:].sum())
        return float(conflict[2:].sum()) / shared if shared else math.nan

    def normalised(self) -> float:
        """The conflict of all over its chance level: 1 as among random signs, 0 in full agreement."""
        _, _, counts, conflict = self._parts()
        chance = sum(float(counts[m]) * chance_conflict(m) for m in range(2, self._count + 1))
        return float(conflict[2:].sum()) / chance if chance else math.nan


def chance_conflict(count: int) -> float:
    """Expected ``1 − |Σ sign| / n`` of n independent random signs.

    From E|S| = ⌈n/2⌉ C(n, ⌈n/2⌉) / 2ⁿ⁻¹ for a simple random walk S of n steps.

    >>> [round(chance_conflict(n), 3) for n in (2, 3, 8)]
    [0.5, 0.5, 0.727]
    """
    half = -(-count // 2)
    return 1 - half * math.comb(count, half) / 2.0 ** (count - 1) / count
