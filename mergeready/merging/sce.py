from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.experts.sums import squared_norm
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import Read, TopK, can_be_held, kept_count, selection_bytes, top_k
from mergeready.weights.source import TensorInfo, chunk_ranges

Reader = Callable[[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Found:
    """The entries that count, None for all of them, how much each expert counts there, and variances that were kept."""

    chosen: TopK | None
    importance: list[float]
    variance: Tensor | None


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
        return super().scratch_bytes(info, experts) + 2 * selection_bytes(info)

    def prepare_jointly(
        self, read: Reader, info: TensorInfo, weights: Sequence[float], prepared: Sequence[Any]
    ) -> _Found:
        chosen, kept = None, None
        if self.density < 1 and sum(weight != 0 for weight in weights) > 1:
            if can_be_held(info):
                kept = torch.cat([_variance(read(a, b), weights) for a, b in chunk_ranges(info)])
            chosen = self._chosen(lambda a, b: _at(kept, read, weights, a, b), info)
        lengths = [0.0] * len(weights)
        for start, stop in chunk_ranges(info):
            deltas = read(start, stop)
            _select(deltas, weights, chosen, start, kept)
            lengths = [found + squared_norm(delta) for found, delta in zip(lengths, deltas, strict=True)]
        importance = [abs(weight) * found for weight, found in zip(weights, lengths, strict=True)]
        return _Found(chosen, importance, kept)

    def _chosen(self, variance: Read, info: TensorInfo) -> TopK:
        differing = sum(int(torch.count_nonzero(variance(a, b))) for a, b in chunk_ranges(info))
        if not differing:
            return TopK(float("inf"), -1)
        return top_k(variance, info, kept_count(self.density, differing))

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        found: _Found = place.joint
        _select(deltas, weights, found.chosen, place.start, found.variance)
        elected = weighted_sum([delta.clone() for delta in deltas], weights).sign_()
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        whole = sum(found.importance)
        for delta, weight, importance in zip(deltas, weights, found.importance, strict=True):
            share = importance / whole if whole else 0.0
            delta.mul_(-1.0 if weight < 0 else 1.0)
            agreeing = delta.mul(elected).relu_().sign_()
            total.add_(delta.mul_(agreeing).mul_(share))
            divisor.add_(agreeing, alpha=share)
        return total.div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))


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


def _at(kept: Tensor | None, read: Reader, weights: Sequence[float], start: int, stop: int) -> Tensor:
    return _variance(read(start, stop), weights) if kept is None else kept[start:stop]


def _select(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    chosen: TopK | None,
    start: int,
    variance: Tensor | None,
) -> None:
    """Make all entries that were not chosen zero, in place."""
    if chosen is None:
        return
    stop = start + len(deltas[0])
    here = _variance(deltas, weights) if variance is None else variance[start:stop]
    mask = chosen.mask(here, start).view(torch.uint8)
    for delta in deltas:
        delta.mul_(mask.to(delta))
