from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.experts.frame import Changes
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.spectral import SpectralMethod

_ZERO = 1e-10  # eigenvalues of Gram matrices are squares


@register
@dataclass(frozen=True, kw_only=True)
class Wudi(SpectralMethod):
    """The merge that, on the inputs that each expert learned from, answers as that expert does.

    Rows of a task vector span the inputs that it was trained on, so they stand for data that is not there. The result
    minimises ``Σ ‖(τ − τᵢ) τᵢᵀ‖² / ‖τᵢ‖² + ρ ‖τ − Σ τᵢ‖²`` exactly: ``τ (A + ρI) = Σ τᵢ Gᵢ + ρ Σ τᵢ`` with
    ``Gᵢ = τᵢᵀ τᵢ / ‖τᵢ‖²`` and ``A = Σ Gᵢ``. Cheng et al., "Whoever Started the Interference Should End It"
    (arXiv 2503.08099), equation 10, is the case ρ = 0.

    The authors start at ``Σ τᵢ`` and take 300 steps of Adam (1e-5 an element and step on ViT, 2e-5 on RoBERTa). How far
    that gets depends on how large task vectors are; ρ plays the part of stopping early, in a unit of its own.

    Their coefficient is 1: ``scale=1`` is the place to start. They merge the weights of linear layers only. Rows
    are outputs, as ``torch.nn.Linear`` stores weights; for embeddings, whose inputs are rows, give another method
    through ``overrides``.

    Attributes:
        ridge: ρ as a share of A's trace, T, in [0, 1]. At 0, the minimiser of least norm, which also fits the noise in
            directions that hardly any expert uses: the demo's four experts answer at chance then (0.04), with 1e-3
            they reach 0.79, and summed 0.71 (validation accuracy at scale 1; 0.78 at the sum's best scale).
    """

    name: ClassVar[str] = "wudi"
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("ridge", self.ridge, zero=True)

    def merge_changes(self, changes: Changes, side: int) -> Tensor:
        columns = changes[0].shape[1]
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=changes[0].device)
        wanted = torch.zeros_like(changes[0])
        ridge = self.ridge * len(changes)  # A has trace T
        for change in changes:
            own = change.T @ change
            own /= own.trace()
            gram += own
            wanted += change @ own + ridge * change
        if ridge:
            gram.diagonal().add_(ridge)
            solution: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(gram))
            return solution.T
        values, inputs = torch.linalg.eigh(gram)
        there = values > _ZERO * values[-1]
        inputs = inputs[:, there]
        least: Tensor = (wanted @ inputs / values[there]) @ inputs.T
        return least
