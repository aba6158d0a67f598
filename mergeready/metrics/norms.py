from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from mergeready.experts.sums import squared_norm
from mergeready.metrics.stream import Accumulator, Chunk


class NormAccumulator(Accumulator):
    """Norms of task vectors and of the base, by parameter.

    ‖τ‖ is how far an expert moved, ‖τ‖/‖θ₀‖ how far relative to where it was; unequal norms among experts (a ratio
    of 5 or more) cost merges many points (arXiv 2508.01148).

    Args:
        names: The parameters that will be seen.
        count: Number of task vectors that count, the first ones of each chunk.
    """

    def __init__(self, names: Sequence[str], count: int) -> None:
        self._row = {name: row for row, name in enumerate(names)}
        self._count = count
        # One column an expert, and the base's in the last.
        self.sums = torch.zeros(len(names), count + 1, dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        row = self.sums[self._row[chunk.name]]
        for column, values in enumerate([*chunk.deltas[: self._count], chunk.base]):
            row[column] += squared_norm(values)

    def norms(self, expert: int) -> dict[str, float]:
        """‖τ‖ of one expert by parameter."""
        return dict(zip(self._row, self.sums[:, expert].sqrt().tolist(), strict=True))

    def norm(self, expert: int) -> float:
        """‖τ‖ of one expert over all parameters."""
        return math.sqrt(float(self.sums[:, expert].sum()))

    def relative_norm(self, expert: int) -> float:
        """‖τ‖ / ‖θ₀‖ of one expert, over the parameters that were seen."""
        base = float(self.sums[:, self._count].sum())
        return math.sqrt(float(self.sums[:, expert].sum()) / base) if base else math.inf

    def by(self, key: Callable[[str], str | None], expert: int) -> dict[str, float]:
        """Norms of one expert by group: ``key`` names each parameter's group, or None to leave it out."""
        squares: dict[str, float] = {}
        for name, row in self._row.items():
            group = key(name)
            if group is not None:
                squares[group] = squares.get(group, 0.0) + float(self.sums[row, expert])
        return {group: math.sqrt(value) for group, value in squares.items()}

    def squared(self, expert: int) -> Mapping[str, float]:
        """‖τ‖² of one expert by parameter."""
        return {name: float(self.sums[row, expert]) for name, row in self._row.items()}


def norm_ratio(norms: Sequence[float]) -> float:
    """Largest over smallest norm among experts; infinite if one is zero.

    >>> norm_ratio([1.0, 4.0, 2.0])
    4.0
    """
    return max(norms) / min(norms) if min(norms) > 0 else math.inf
