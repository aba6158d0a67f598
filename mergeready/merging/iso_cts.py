from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.experts.frame import Changes
from mergeready.experts.svd import polar, thin_svd, total
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.spectral import SpectralMethod


@register
@dataclass(frozen=True, kw_only=True)
class IsoCts(SpectralMethod):
    """Isotropic merging in common and task-specific subspaces.

    Of the sum ``Σ wᵢ τᵢ``, of rank r, the first k left singular vectors ``U_c`` span the common subspace. The other
    ``r − k`` directions are given to the tasks in equal shares: the largest singular triples of ``τᵢ − U_c U_cᵀ τᵢ``.
    All directions together are made orthogonal as in TSV-M and get one singular value, the mean of theirs:
    ``σ̄ · U⊥ V⊥ᵀ``. Marczak et al., "No Task Left Behind" (arXiv 2502.04959), algorithm 1.

    The authors tune ``scale`` (their library's default is 1; 1.5 for eight tasks on ViT-B/32 elsewhere); 1 is where
    to start. They average parameters that are no matrices (``rest``). ``r`` is the rank of the sum, the shorter
    side in their code, which differs for low-rank experts only: there it fills up with arbitrary directions.

    Attributes:
        common: Share k / r of the common subspace, in (0, 1]; rounded so that the rest is divisible by the tasks.
    """

    name: ClassVar[str] = "iso_cts"
    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("common", self.common)

    def merge_changes(self, changes: Changes, side: int) -> Tensor:
        left, values, right = thin_svd(total(changes))
        if not len(values):
            return left @ right
        rank, tasks = len(values), len(changes)
        share = min(round((rank - int(rank * self.common)) / tasks), rank // tasks)
        kept = rank - share * tasks
        left, values, right = left[:, :kept], values[:kept], right[:kept]
        own = [thin_svd(change - left @ (left.T @ change), share, change.norm()) for change in changes]
        directions = polar(torch.cat([*(U for U, _, _ in own), left], dim=1))
        inputs = polar(torch.cat([*(V for _, _, V in own), right], dim=0))
        return directions @ (torch.cat([*(s for _, s, _ in own), values]).mean() * inputs)
