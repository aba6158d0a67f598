from __future__ import annotations

import torch
from torch import Tensor

from mergeready.experts.sums import inner_products
from mergeready.metrics.stream import Accumulator, Chunk


class GramAccumulator(Accumulator):
    """Inner products ⟨τᵢ, τⱼ⟩ of task vectors, and their cosines.

    A diagnostic: cosines alone predict merge quality badly (arXiv 2502.04959, 2601.22285).

    Args:
        count: Number of task vectors.
        first_row_only: Compute the products of the first with all others only, the others' being known.
    """

    def __init__(self, count: int, *, first_row_only: bool = False) -> None:
        self._rows = 1 if first_row_only else count
        self.sums = torch.zeros(self._rows, count, dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        stacked = torch.stack(list(chunk.deltas))
        self.sums += inner_products(stacked[: self._rows], stacked)

    def cosines(self, norms: Tensor | None = None) -> Tensor:
        """Cosines, float64, shape (rows, count); NaN where a norm is zero.

        Args:
            norms: Norm of each task vector over *all* its parameters, needed when only some were seen or only
                the first row was computed.
        """
        if norms is None:
            norms = self.sums.diagonal().sqrt()
        return self.sums / (norms[: self._rows, None] * norms[None, :])
