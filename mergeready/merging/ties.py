from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import ElementwiseMethod, Place, weighted
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import TopK, kept_count, selection_bytes, top_k
from mergeready.weights.source import TensorInfo


@register
@dataclass(frozen=True, kw_only=True)
class Ties(ElementwiseMethod):
    """Trim, elect sign, merge what agrees.

    ``τ̂ᵢ`` keeps the ``density`` share of largest |τᵢ|; ``γ = sign(Σ wᵢ τ̂ᵢ)``; the result is the mean of those
    ``τ̂ᵢ`` whose sign is γ, weighted by ``wᵢ``. Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1,
    with three definite choices: trimming is by parameter, not over the whole vector; where the signs cancel
    exactly the result is zero; ``wᵢ`` only sets proportions, since the merge is a mean.

    Attributes:
        density: Share of entries that each expert keeps, in (0, 1]. At 1 nothing is trimmed.
    """

    name: ClassVar[str] = "ties"
    passes: ClassVar[int] = 2
    density: float = 0.2

    def __post_init__(self) -> None:
        require_fraction("density", self.density)

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        return super().scratch_bytes(info, experts) + selection_bytes(info)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> TopK:
        info = vector.infos[name]
        return top_k(lambda a, b: vector.flat(name, a, b), info, kept_count(self.density, info.numel))

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        if self.density < 1:
            for delta, kept in zip(deltas, prepared, strict=True):
                if kept is not None:
                    kept.trim(delta, place.start)
        return elect_and_average(deltas, weights)


def elect_and_average(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the entries that agree with the sign of the weighted sum; the steps after TIES' trimming.

    >>> elect_and_average([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])], [1.0, 1.0])
    tensor([ 2., -2.])
    """
    parts = weighted(deltas, weights)
    elected = parts[0] + parts[1] if len(parts) > 1 else parts[0].clone()
    for part in parts[2:]:
        elected.add_(part)
    elected.sign_()
    # Times the sign, what agrees is positive. Comparisons would cost several times as much as these.
    total = parts[0].mul_(elected).relu_()
    divisor = total.sign()
    if abs(weights[0]) != 1:
        divisor.mul_(abs(weights[0]))
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part.mul_(elected).relu_())
        divisor.add_(part.sign_(), alpha=abs(weight))
    total.abs_()  # no negative zeros, whose sign would depend on how a parameter was cut
    return total.mul_(elected).div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))
