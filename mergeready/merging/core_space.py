from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, LowRank
from mergeready.experts.frame import changes_anything, device_of
from mergeready.merging.inner import InnerLike, WrappingMethod, as_deltas, require_no_data
from mergeready.merging.method import Place
from mergeready.merging.registry import register
from mergeready.merging.spectral import nothing


@register
@dataclass(frozen=True, kw_only=True)
class CoreSpace(WrappingMethod):
    """Merge LoRA experts as small cores in the bases that their factors share.

    With ``τᵢ = Bᵢ Aᵢ``, ``U`` the left singular vectors of ``[B₁ … B_T]`` and ``V`` the right ones of
    ``[A₁; …; A_T]``: the inner method merges the ``Uᵀ τᵢ V``, of side Σ rank, and ``U · merged · Vᵀ`` is the result;
    nothing is lost on the way. Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space"
    (arXiv 2509.17786), section 4.

    A ``scale`` as for the inner method. Where an expert's change of a parameter is not of low rank, the
    space is the whole one: the inner method merges the parameter as it is. Experts without a parameter do not shape
    its bases.

    Attributes:
        inner: How to merge the cores. TSV-M and Iso-C are the paper's strongest.
    """

    name: ClassVar[str] = "core_space"
    inner: InnerLike = "tsv_m"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_data(self.name, self.method)

    def merge_finite(self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place) -> Tensor:
        if not all(isinstance(delta, LowRank) for delta in deltas if delta is not None):
            return self.merge_inside(deltas, weights, place)
        taking_part = {
            slot: delta
            for slot, delta in enumerate(deltas)
            if isinstance(delta, LowRank) and weights[slot] != 0 and changes_anything(delta)
        }
        if not taking_part:
            return nothing(deltas)
        where = device_of(deltas)
        factors = {
            slot: (delta.B.to(where, torch.float64), delta.A.to(where, torch.float64))
            for slot, delta in taking_part.items()
        }
        left = _basis([B.T for B, _ in factors.values()])
        right = _basis([A for _, A in factors.values()])
        cores = {slot: (left @ B) @ (A @ right.T) for slot, (B, A) in factors.items()}
        merged = self.merge_inside(as_deltas(cores, len(deltas)), weights, place)
        return (left.T @ (merged.to(left) @ right)).float()


def _basis(factors: Sequence[Tensor]) -> Tensor:
    """Right singular vectors of factors below each other, as rows, those of zero singular values too."""
    stacked = torch.cat(list(factors))
    side: Tensor | None = None
    if stacked.shape[0] < stacked.shape[1]:
        side, triangle = torch.linalg.qr(stacked.T.contiguous())
        stacked = triangle.T.contiguous()
    basis: Tensor = torch.linalg.svd(stacked, full_matrices=False).Vh
    return basis if side is None else basis @ side.T
