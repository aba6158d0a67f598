from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import Delta
from mergeready.experts.frame import Frame
from mergeready.experts.svd import ZERO, thin_svd, total
from mergeready.merging.inner import WrappingMethod
from mergeready.merging.method import Place
from mergeready.merging.registry import register

_LEFT_OUT = (
    1e-12  # share of ‖M‖² outside the frame: fp32 rounding leaves about 1e-14, an elementwise method far more
)


@register
@dataclass(frozen=True, kw_only=True)
class SingularValueCalibration(WrappingMethod):
    """Any merge, with singular values taken back where the experts' shared directions were counted several times.

    For the merged matrix ``M = U Σ Vᵀ``, each direction r and expert i: ``aᵢ = uᵣᵀ τᵢ`` is what the expert does in that
    direction, ``sᵢ = ⟨uᵣᵀ M, aᵢ⟩ / ‖aᵢ‖²`` how many times over the merge does it. The calibrated value is
    ``σᵣ · K / Σᵢ max(α, sᵢ)``. Li et al., "When Shared Knowledge Hurts" (arXiv 2602.05536), algorithm 1. Rows are
    outputs, as ``torch.nn.Linear`` stores weights.

    A factor λ on M counts out where all ``sᵢ > α``; elsewhere λ and α matter through α / λ only. So ``scale=1``
    is right for sums, and what the authors publish for 0.3 · task arithmetic is ``alpha = 1 / (0.3 K)`` here. Their
    scripts set α = 1 / K, and 1 for TSV-M. Parameters that are no matrices stay as the inner method made them.

    Where singular values coincide, as all do after Iso-C, directions are those in which the sum of the experts is
    diagonal; the authors leave them to rounding. Experts that change nothing in a parameter do not count in its K.
    An expert that does nothing in a direction (``‖aᵢ‖ ≤ 1e-6 ‖τᵢ‖``) counts there with ``sᵢ = 0``, as in the authors'
    code, whose bound is absolute.

    Attributes:
        inner: The merge to calibrate.
        alpha: Smallest ``sᵢ`` that counts. 1 only takes back; smaller values also amplify directions that the merge
            does less than once. None for 1 / K.
    """

    name: ClassVar[str] = "svc"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.alpha
        if alpha is not None and (not isinstance(alpha, int | float) or not 0 < alpha < math.inf):
            raise OptionError(f"`alpha` must be a positive number or None, not {alpha!r}.")

    def merge_finite(self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place) -> Tensor:
        merged = self.merge_inside(deltas, weights, place)
        frame = Frame.of(deltas, weights)
        if frame is None or not bool(torch.isfinite(merged).all()):
            return merged
        alpha = 1 / len(frame.changes) if self.alpha is None else self.alpha
        matrix = merged.reshape(frame.shape).to(frame.changes.device, torch.float64)
        if frame.left is not None and frame.right is not None:
            core = frame.left.T @ matrix @ frame.right
            if matrix.square().sum() - core.square().sum() <= _LEFT_OUT * matrix.square().sum():
                return frame.restore(calibrated(core, frame.changes, alpha)).float()
            frame = frame.whole(deltas)
        return calibrated(matrix, frame.changes, alpha).float()


def calibrated(matrix: Tensor, changes: Sequence[Tensor], alpha: float) -> Tensor:
    """A merged matrix with calibrated singular values; all float64.

    >>> one = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> calibrated(3 * one, [one, one, one], alpha=0.5)  # counted three times
    tensor([[2., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    left, values, right = _settled(*thin_svd(matrix), changes)
    counted = torch.zeros_like(values)
    for change in changes:
        answers = left.T @ change
        energy = answers.square().sum(1)
        times = values * (answers * right).sum(1) / energy
        there = energy > (ZERO * change.norm()) ** 2
        counted += torch.where(there, times, 0.0).clamp(min=alpha)
    return (left * (values * len(changes) / counted)) @ right


def _settled(
    left: Tensor, values: Tensor, right: Tensor, changes: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples, in which those of equal values are turned so that the sum of the changes is diagonal."""
    edges = (values[:-1] - values[1:] > ZERO * values[:1]).nonzero().flatten() + 1
    borders = [0, *edges.tolist(), len(values)]
    for start, stop in pairwise(borders):
        if stop - start > 1:
            U, V = left[:, start:stop], right[start:stop]
            along = U.T @ (total(changes) @ V.T)
            turn = torch.linalg.eigh(along + along.T).eigenvectors
            left[:, start:stop], right[start:stop] = U @ turn, turn.T @ V
    return left, values, right
