from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mergeready.experts.frame import Changes
from mergeready.experts.svd import thin_svd, total
from mergeready.merging.registry import register
from mergeready.merging.spectral import SpectralMethod


@register
@dataclass(frozen=True, kw_only=True)
class IsoC(SpectralMethod):
    """Isotropic merging in the common subspace: the sum of the task vectors with a flat spectrum.

    ``Σ wᵢ τᵢ = U Σ Vᵀ`` becomes ``σ̄ · U Vᵀ`` with ``σ̄`` the mean of the singular values that are not zero. Marczak et
    al., "No Task Left Behind" (arXiv 2502.04959), section 4.

    The authors tune ``scale`` (1.3 for eight tasks on ViT-B/32); 1 is where to start. They average parameters that
    are no matrices (``rest``). For a sum of lower rank, such as LoRA experts', their code also gives ``σ̄`` to arbitrary
    directions of zero singular values, and counts those in the mean; here they stay zero and are not counted, as in
    Core Space merging.
    """

    name: ClassVar[str] = "iso_c"

    def merge_changes(self, changes: Changes, side: int) -> Tensor:
        left, values, right = thin_svd(total(changes))
        if not len(values):
            return left @ right
        return left @ (values.mean() * right)
