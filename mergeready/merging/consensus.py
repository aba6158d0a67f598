from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Consensus(ElementwiseMethod):
    """Task arithmetic on those entries only that several experts use: ``τ ∘ [Σᵢ mᵢ ≥ min_experts]``.

    ``τ = Σ wᵢ τᵢ``, and expert i uses an entry, ``mᵢ = [|wᵢ τᵢ| > selectivity · |τ - wᵢ τᵢ|]``, if its own part there
    is not small beside that of all others (a TALL mask). What nobody uses ("catastrophic") or one alone ("selfish")
    is dropped. Wang et al., "Localizing Task Information for Improved Model Merging and Compression"
    (arXiv 2405.07813): TALL masks and consensus task arithmetic. As in the authors' code the comparison is strict. They
    choose ``selectivity`` for each expert on validation data among 0.2, 0.3, … 0.6; here it is one number, by
    default the middle of these.

    Attributes:
        selectivity: The paper's λ, positive: how large an expert's part must be beside that of all others.
        min_experts: The paper's k, at least 1: by how many experts an entry must be used. Where fewer take part, with a
            weight that is not zero, all of them must.
    """

    name: ClassVar[str] = "consensus"
    selectivity: float = 0.4
    min_experts: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.selectivity, int | float) or not 0 < self.selectivity < float("inf"):
            raise OptionError(f"`selectivity` must be positive and finite, not {self.selectivity!r}.")
        if not isinstance(self.min_experts, int) or self.min_experts < 1:
            raise OptionError(f"`min_experts` must be a whole number, at least 1, not {self.min_experts!r}.")

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        parts = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
        total = weighted_sum([part.clone() for part in parts], [1.0] * len(parts))
        users = torch.zeros(total.shape, dtype=torch.int16, device=total.device)
        for part in parts:
            others = torch.sub(total, part).abs_().mul_(self.selectivity)
            users.add_(part.abs_() > others)
        needed = min(self.min_experts, sum(weight != 0 for weight in weights))
        return total.mul_(users >= needed)
