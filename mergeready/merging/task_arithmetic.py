from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(ElementwiseMethod):
    """The weighted sum of the task vectors: ``Σ wᵢ τᵢ``.

    Ilharco et al., "Editing Models with Task Arithmetic" (arXiv 2212.04089), section 2. Its scaling coefficient
    λ is the engines' ``scale``; 0.3 to 0.4 is common for eight experts, more for fewer.
    """

    name: ClassVar[str] = "task_arithmetic"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        return weighted_sum(deltas, weights)
