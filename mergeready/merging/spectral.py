"""What methods on singular vectors share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.experts.delta import Delta
from mergeready.experts.frame import Changes, Frame, all_finite, matrix_shape
from mergeready.merging.method import MatrixMethod, Place
from mergeready.merging.registry import require_elementwise


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(MatrixMethod):
    """A matrix method that commutes with changes of basis: ``f(Q τ₁ Pᵀ, Q τ₂ Pᵀ, …) = Q f(τ₁, τ₂, …) Pᵀ``.

    So low-rank deltas are merged as small cores in a basis that holds them all, exactly, and no matrix of the
    parameter's size is decomposed. Arithmetic is float64. Experts that leave a parameter as it is (without a delta,
    with a delta of zeros or with weight 0) take no part in its merge.

    Attributes:
        rest: Name of the elementwise method, with its defaults, for parameters that are no matrices.
    """

    rest: str = "average"

    def __post_init__(self) -> None:
        require_elementwise("rest", self.rest)

    @abstractmethod
    def merge_changes(self, changes: Changes, side: int) -> Tensor:
        """Merge weighted deltas that are not zero.

        Args:
            changes: One float64 matrix an expert that takes part, all of one shape; computed at each access.
            side: The shorter side of the parameter itself, of which the matrices may be cores.
        """

    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        if not all_finite(deltas):
            return nothing(deltas, fill=float("nan"))
        return self.merge_exactly(deltas, weights, place).float()

    def merge_exactly(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place | None = None
    ) -> Tensor:
        """The merged matrix in float64, of deltas without NaN and infinite values."""
        where = ((), "") if place is None else (place.memories, place.name)
        frame = Frame.of(deltas, weights, *where)
        if frame is None:
            return nothing(deltas)
        return frame.restore(self.merge_changes(frame.changes, min(frame.shape)))


def nothing(deltas: Sequence[Delta | None], fill: float = 0.0) -> Tensor:
    """A merged delta that is the same everywhere."""
    shape = next(matrix_shape(delta) for delta in deltas if delta is not None)
    return torch.full(shape, fill)
