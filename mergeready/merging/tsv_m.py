from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.experts.frame import Changes
from mergeready.experts.svd import polar
from mergeready.merging.registry import register
from mergeready.merging.spectral import SpectralMethod


@register
@dataclass(frozen=True, kw_only=True)
class TsvMerge(SpectralMethod):
    """Task singular vectors: keep each task's strongest directions, and make those of all tasks orthogonal.

    With ``τᵢ = Uᵢ Σᵢ Vᵢᵀ`` cut to its ``k = ⌊r / T⌋`` largest singular values, and ``U = [U₁ … U_T]``,
    ``V = [V₁ … V_T]`` beside each other: ``U⊥ · diag(Σ₁, …, Σ_T) · V⊥ᵀ``, where ``X⊥`` is the matrix with orthonormal
    columns nearest to X. Gargiulo et al., "Task Singular Vectors" (arXiv 2412.00081), algorithm 1.

    =======  ======================================================================
    r        shorter side of the parameter
    T        experts that change it (the whitening must not see directions of zeros)
    k        at least 1, so that heads with fewer outputs than there are experts are merged, too
    =======  ======================================================================

    The authors' coefficient is 1: ``scale=1`` is the place to start. They average parameters that are no matrices
    (``rest``). Where directions of several tasks coincide exactly, X⊥ spreads over them evenly: an expert given twice
    counts once. One expert alone stays as it is.

    Low-rank experts keep all their directions while ``T · rank ≤ r``. The authors' code, given such matrices, also
    whitens the arbitrary vectors of their zero singular values; here those take no part.
    """

    name: ClassVar[str] = "tsv_m"

    def merge_changes(self, changes: Changes, side: int) -> Tensor:
        kept = max(1, side // len(changes))
        triples = [changes.triples(index, kept) for index in range(len(changes))]
        left = torch.cat([U for U, _, _ in triples], dim=1)
        values = torch.cat([values for _, values, _ in triples])
        right = torch.cat([V for _, _, V in triples], dim=0)
        return polar(left) @ (values[:, None] * polar(right))
