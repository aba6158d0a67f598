from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.experts.sums import squared_norm
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import TopK, kept_count, top_k
from mergeready.weights.source import TensorInfo, chunk_ranges

Reader = Callable[[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Found:
    """The entries that count, None for all of them, and how much each expert counts there."""

    chosen: TopK | None
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

    def prepare_jointly(
        self, read: Reader, info: TensorInfo, weights: Sequence[float], prepared: Sequence[Any]
    ) -> _Found:
        chosen = self._chosen(read, info, weights)
        lengths = [0.0] * len(weights)
        for start, stop in chunk_ranges(info):
            deltas = read(start, stop)
            _select(deltas, weights, chosen, start)
            lengths = [found + squared_norm(delta) for found, delta in zip(lengths, deltas, strict=True)]
        return _Found(chosen, [abs(weight) * found for weight, found in zip(weights, lengths, strict=True)])

    def _chosen(self, read: Reader, info: TensorInfo, weights: Sequence[float]) -> TopK | None:
        if self.density == 1 or sum(weight != 0 for weight in weights) < 2:
            return None
        differing = sum(int((_variance(read(a, b), weights) != 0).sum()) for a, b in chunk_ranges(info))
        if not differing:
            return TopK(float("inf"), -1)
        return top_k(lambda a, b: _variance(read(a, b), weights), info, kept_count(self.density, differing))

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        found: _Found = place.joint
        _select(deltas, weights, found.chosen, place.start)
        elected = weighted_sum([delta.clone() for delta in deltas], weights).sign_()
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        whole = sum(found.importance)
        for delta, weight, importance in zip(deltas, weights, found.importance, strict=True):
            share = importance / whole if whole else 0.0
            delta.mul_(-1.0 if weight < 0 else 1.0)
            agrees = (torch.sign(delta) == elected) & (delta != 0)
            total.add_(delta.mul_(agrees).mul_(share))
            divisor.add_(agrees, alpha=share)
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


def _select(deltas: Sequence[Tensor], weights: Sequence[float], chosen: TopK | None, start: int) -> None:
    """Make all entries that were not chosen zero, in place."""
    if chosen is None:
        return
    mask = chosen.mask(_variance(deltas, weights), start)
    for delta in deltas:
        delta.mul_(mask)
