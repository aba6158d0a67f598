from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.merging.angles import cosines
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register
from mergeready.weights.source import TensorInfo


@register
@dataclass(frozen=True, kw_only=True)
class ModelStock(ElementwiseMethod):
    """The weighted mean, drawn towards the base by how much the experts disagree: ``t · Σ wᵢ τᵢ / Σ wᵢ``.

    ``t = N c / (1 + (N - 1) c)``, where ``c`` is the mean cosine of two task vectors and N the number of experts with
    a weight that is not zero. Jang et al., "Model Stock" (arXiv 2403.19522), section 4, by parameter as there. Three
    definite choices: with one expert t is 1; where the mean cosine is negative, outside of
    the paper's assumptions, t is 0 and the parameter stays the base's, while the formula would turn the
    update around and grow without bound; a task vector of zeros has the cosine 0 with every other.

    Meant for experts of one task. Those of different tasks are nearly orthogonal, and little of them is left.
    """

    name: ClassVar[str] = "model_stock"
    passes: ClassVar[int] = 2

    def prepare_jointly(
        self,
        read: Callable[[int, int], list[Tensor]],
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
    ) -> float:
        chosen = [i for i, weight in enumerate(weights) if weight != 0]
        count = len(chosen)
        if count < 2:
            return 1.0
        among = cosines(read, info, len(weights))[chosen][:, chosen].nan_to_num(0.0)
        mean = max(0.0, float(torch.triu(among, 1).sum()) / (count * (count - 1) / 2))
        return count * mean / (1 + (count - 1) * mean)

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        total = sum(weights)
        return weighted_sum(deltas, [place.joint * weight / total if total else 0.0 for weight in weights])
