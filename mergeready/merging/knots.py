from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.experts.delta import Delta
from mergeready.experts.frame import Frame
from mergeready.experts.svd import thin_svd
from mergeready.merging.inner import InnerLike, WrappingMethod, as_deltas, require_no_data
from mergeready.merging.method import Place
from mergeready.merging.registry import register
from mergeready.merging.spectral import nothing


@register
@dataclass(frozen=True, kw_only=True)
class Knots(WrappingMethod):
    """Align the experts' outputs by one SVD of all of them, and merge in those coordinates, by TIES unless told else.

    ``[τ₁ … τ_T] = U Σ [V₁ … V_T]ᵀ`` (matrices beside each other); the inner method merges the ``Σ Vᵢᵀ = Uᵀ τᵢ`` with
    the experts' weights, and ``U`` leads back. Stoica et al., "Model merging with SVD to tie the Knots"
    (arXiv 2410.19735), equations 2 to 4. Rows are outputs, as ``torch.nn.Linear`` stores weights.

    The result is what TIES gives, a mean: the authors tune ``scale`` around 1 (0.6 in one configuration); 1 is where
    to start. Their TIES trims over the whole model, ours each parameter for itself. Experts that change nothing in a
    parameter are not part of its SVD. Where singular values coincide exactly, U is arbitrary and so is the result
    of an inner method that depends on coordinates.

    Attributes:
        inner: How to merge the aligned parts; ``dare_ties`` is the paper's other choice.
    """

    name: ClassVar[str] = "knots"
    inner: InnerLike = "ties"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_data(self.name, self.method)

    def merge_finite(self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place) -> Tensor:
        frame = Frame.of(deltas, [float(weight != 0) for weight in weights])
        if frame is None:
            return nothing(deltas)
        basis, _, _ = thin_svd(torch.cat(list(frame.changes), dim=1))
        aligned = {slot: basis.T @ change for slot, change in zip(frame.slots, frame.changes, strict=True)}
        if frame.right is not None:
            aligned = {slot: part @ frame.right.T for slot, part in aligned.items()}
        merged = self.merge_inside(as_deltas(aligned, len(deltas)), weights, place)
        if frame.left is not None:
            basis = frame.left @ basis
        return (basis @ merged.to(basis)).float()
