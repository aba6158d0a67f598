from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergeready.experts.sums import squared_norm
from mergeready.merging.largest import largest
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum, zeros_if_finite
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import TopK, kept_count, selection_bytes, top_k
from mergeready.weights.source import TensorInfo, chunk_ranges

Reader = Callable[[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Found:
    """The entries that count, None for all of them, and how much each expert counts there."""

    chosen: TopK | Tensor | None
    importance: list[float]


@register
@dataclass(frozen=True, kw_only=True)
class Sce(ElementwiseMethod):
    """Select where experts differ, calculate how much each counts, erase the minority's sign.

    Of the entries that are not the same in all experts, the ``density`` share with the largest variance is kept.
    There expert i counts ``ηᵢ = |wᵢ| Σ τᵢ²``, and the result is the mean, weighted by ``ηᵢ``, of those ``sign(wᵢ) τᵢ``
    whose sign is that of ``Σ wᵢ τᵢ``. Wan et al., "FuseChat" (arXiv 2408.07990), SCE, by parameter as there.

    What all experts agree on is dropped, so that equal experts merge to nothing: the method is for experts that differ.
    At density 1, and where only one expert has a weight that is not zero, everything is kept.

    Attributes:
        density: The paper's τ: share kept of the entries that differ, in (0, 1].
    """

    name: ClassVar[str] = "sce"
    passes: ClassVar[int] = 5
    density: float = 0.1

    def __post_init__(self) -> None:
        require_fraction("density", self.density)

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        kept = (
            32 * info.numel if self.holds(info, experts) else 0
        )  # variances, positions of those that are kept
        return super().scratch_bytes(info, experts) + 2 * selection_bytes(info) + kept

    def prepare_jointly(
        self, read: Reader, info: TensorInfo, weights: Sequence[float], prepared: Sequence[Any]
    ) -> _Found:
        chosen = self._chosen(read, info, weights)
        lengths = [0.0] * len(weights)
        for start, stop in chunk_ranges(info):
            deltas, _ = _selected(read(start, stop), weights, chosen, start)
            lengths = [found + squared_norm(delta) for found, delta in zip(lengths, deltas, strict=True)]
        importance = [abs(weight) * found for weight, found in zip(weights, lengths, strict=True)]
        return _Found(chosen, importance)

    def _chosen(self, read: Reader, info: TensorInfo, weights: Sequence[float]) -> TopK | Tensor | None:
        """The entries that are kept: their positions where variances fit into memory, else what tells them."""
        if self.density == 1 or sum(weight != 0 for weight in weights) < 2:
            return None
        if self.holds(info, len(weights)):
            variance = (
                torch.cat([_variance(read(a, b), weights) for a, b in chunk_ranges(info)]).cpu().numpy()
            )
            differing = int(np.count_nonzero(variance))
            kept = (
                largest(variance, kept_count(self.density, differing)) if differing else np.empty(0, np.int64)
            )
            return torch.from_numpy(kept)
        differing = sum(
            int(torch.count_nonzero(_variance(read(a, b), weights))) for a, b in chunk_ranges(info)
        )
        if not differing:
            return TopK(float("inf"), -1)
        return top_k(lambda a, b: _variance(read(a, b), weights), info, kept_count(self.density, differing))

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        found: _Found = place.joint
        merged = zeros_if_finite(deltas)
        parts, index = _selected(deltas, weights, found.chosen, place.start)
        elected = weighted_sum([part.clone() for part in parts], weights).sign_()
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        whole = sum(found.importance)
        for part, weight, importance in zip(parts, weights, found.importance, strict=True):
            share = importance / whole if whole else 0.0
            signed = part * (-1.0 if weight < 0 else 1.0)
            agreeing = signed.mul(elected).relu_().sign_()
            total.add_(signed.mul_(agreeing).mul_(share))
            divisor.add_(agreeing, alpha=share)
        total.div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))
        return merged.add_(total) if index is None else merged.index_add_(0, index, total)


def _variance(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The variance of each entry over the experts that count, times their number, fp32."""
    values = [delta.float() for delta, weight in zip(deltas, weights, strict=True) if weight != 0]
    mean = torch.zeros_like(values[0])
    for value in values:
        mean.add_(value)
    mean.div_(len(values))
    variance = torch.zeros_like(mean)
    for value in values:
        variance.add_(value.sub(mean).square_())
    return variance


def _selected(
    deltas: Sequence[Tensor], weights: Sequence[float], chosen: TopK | Tensor | None, start: int
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The chosen entries of a chunk, and where they are in it; None for everywhere."""
    if chosen is None:
        return deltas, None
    if isinstance(chosen, TopK):
        index = chosen.mask(_variance(deltas, weights), start).nonzero().flatten()
    else:
        first, last = torch.searchsorted(chosen, torch.tensor([start, start + len(deltas[0])])).tolist()
        index = (chosen[first:last] - start).to(deltas[0].device)
    return [delta.index_select(0, index) for delta in deltas], index
