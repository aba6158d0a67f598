from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import TopK, kept_count, selection_bytes, top_ks
from mergeready.weights.source import TensorInfo


@dataclass(frozen=True, slots=True)
class _Band:
    """The entries among the largest that are not among the very largest."""

    largest: TopK
    outliers: TopK | None

    def trim(self, chunk: Tensor, start: int) -> None:
        """Put zeros in place of all other entries, in place; infinite ones become NaN, so that engines see them."""
        top = None if self.outliers is None else self.outliers.trimmed(chunk, start)
        self.largest.trim(chunk, start)
        if top is not None:
            chunk.sub_(top)


@register
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(ElementwiseMethod):
    """Mask both tails, then the weighted sum: ``Σ wᵢ mᵢ ∘ τᵢ``.

    ``mᵢ`` drops the ``gamma`` share of largest |τᵢ|, which are outliers, keeps the ``density`` share below it, and
    drops the rest. Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795), section 3: kept are magnitudes
    between the percentiles β and γ of a layer, β = 85 and γ = 99.3 in its experiments. The authors'
    code ranks each row by itself and takes the two shares as here; this ranks whole parameters, as the paper does.

    Attributes:
        density: Share of entries kept, in (0, 1]. At 1 nothing is dropped, whatever ``gamma`` is.
        gamma: Share of outliers dropped, in [0, 1]; less where ``density`` leaves less.
    """

    name: ClassVar[str] = "breadcrumbs"
    passes: ClassVar[int] = 2
    density: float = 0.15
    gamma: float = 0.007

    def __post_init__(self) -> None:
        require_fraction("density", self.density)
        require_fraction("gamma", self.gamma, zero=True)

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        return super().scratch_bytes(info, experts) + selection_bytes(info, 2)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> _Band:
        info = vector.infos[name]
        kept = kept_count(self.density, info.numel)
        outliers = min(math.floor(self.gamma * info.numel + 1e-9), info.numel - kept)

        counts = [kept + outliers, outliers] if outliers else [kept]
        found = top_ks(lambda a, b: vector.flat(name, a, b), info, counts)
        return _Band(found[0], found[1] if outliers else None)

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        if self.density < 1:
            for delta, band in zip(deltas, prepared, strict=True):
                if band is not None:
                    band.trim(delta, place.start)
        return weighted_sum(deltas, weights)
