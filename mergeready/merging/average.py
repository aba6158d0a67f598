from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Average(ElementwiseMethod):
    """The weighted mean of the experts: ``Σ wᵢ τᵢ / Σ wᵢ``.

    With scale 1 this is the mean of the weights themselves (Wortsman et al., "Model soups", arXiv 2203.05482).
    An expert without the parameter counts as unchanged there. Weights that sum to zero give a zero delta.
    """

    name: ClassVar[str] = "average"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        total = sum(weights)
        return weighted_sum(deltas, [weight / total if total else 0.0 for weight in weights])
