from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.random_mask import kept_share, random_mask
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.ties import elect_and_average


@dataclass(frozen=True, kw_only=True)
class _Dare(ElementwiseMethod):
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_fraction("density", self.density)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> int:
        return slot

    def _drop(self, deltas: Sequence[Tensor], prepared: Sequence[Any], place: Place) -> float:
        """Drop entries at random, in place, and return the factor 1/density by which what is left keeps its mean."""
        if self.density == 1:
            return 1.0
        for delta, slot in zip(deltas, prepared, strict=True):
            if slot is not None:
                mask = random_mask(
                    self.density,
                    seed=self.seed,
                    slot=slot,
                    name=place.name,
                    start=place.start,
                    stop=place.stop,
                )
                kept = mask.view(torch.uint8).to(
                    delta
                )  # torch converts bytes, not booleans, several at a time
                delta.mul_(kept)
        return 1 / kept_share(self.density)


@register
@dataclass(frozen=True, kw_only=True)
class DareLinear(_Dare):
    """Drop And REscale, then the weighted sum: ``Σ wᵢ mᵢ ∘ τᵢ / density`` with ``mᵢ ~ Bernoulli(density)``.

    Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), equations 1 to 3; its drop rate is
    ``1 - density``. Masks depend on the seed, the parameter's name and the expert's position only.

    Attributes:
        density: Share of entries kept, in (0, 1], in steps of 1/65536.
        seed: Seed of the masks.
    """

    name: ClassVar[str] = "dare_linear"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        factor = self._drop(deltas, prepared, place)
        return weighted_sum(deltas, weights).mul_(factor)


@register
@dataclass(frozen=True, kw_only=True)
class DareTies(_Dare):
    """Drop And REscale in place of TIES' trimming, then sign election and the mean of what agrees.

    Sources as for ``dare_linear`` and ``ties``.

    Attributes:
        density: Share of entries kept, in (0, 1], in steps of 1/65536.
        seed: Seed of the masks.
    """

    name: ClassVar[str] = "dare_ties"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        factor = self._drop(deltas, prepared, place)
        return elect_and_average(deltas, weights).mul_(factor)
