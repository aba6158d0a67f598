from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mergeready.experts.factors import KroneckerFactors
from mergeready.training.penalties import kronecker_drift
from mergeready.training.techniques.layer_change import LayerChange, require_list, summed_layers
from mergeready.training.techniques.penalty import Penalty, RunningPenalty
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running


@register
@dataclass(frozen=True, kw_only=True)
class KroneckerPenalty(Penalty):
    """A drift penalty that knows where peers are sensitive: ``R = λ Σ tr(B D A Dᵀ)`` over linear layers.

    D is the change of a layer's weight and bias, ``B ⊗ A`` the sum of the peers' factors
    (:func:`mergeready.experts.factors.sum_factors`), which ``mergeready factors`` makes from their data once; no data
    are shared. R is, to second order, what this expert's change does to the peers' predictions. Directions that no peer
    cares about are free: that is the difference to pulling all weights (``drift_penalty``). TAK (arXiv 2602.17385).

    Published with λ = 100 for linearised training: eight ViT-B/32 experts 85.8 at merge scale 1 (86.0 tuned), where
    the plain ones gave about 70. For training as usual, attention weights only: 83.1 with the scale tuned, 60.3 at 1.
    So tune the scale. Parameters without factors (norms, embeddings, convolutions, the task's head) are left alone.

    Cost: two products of matrices a layer each time, which beside small batches is more than the training itself (see
    ``every``), and the factors in memory, whatever the number of peers. Of a sharded model, every rank gathers one
    layer's change at a time.

    Of models that are trained whole, ``kronecker_filter`` cost experts less, and less time.

    The defaults are those that raised merges of eight text encoders by task arithmetic most (docs/results.md). With
    λ = 5 or only every 32nd step they gained less, and with λ = 100 experts learned less, too.

    Attributes:
        factors: One for each peer: files, or what ``kronecker_factors`` returned. On this run's base.
        strength: λ, at least 0; 0 switches it off.
        every: Steps from one such gradient to the next, at least 1; it is that many times as strong then.
        weights: One λₜ a peer, see ``sum_factors``; 1/T each by default.

    Example:
        >>> KroneckerPenalty(factors=["law.factors.safetensors"], strength=0).is_off
        True
    """

    name: ClassVar[str] = "kronecker_penalty"

    factors: Sequence[str | Path | KroneckerFactors]
    strength: float = 20.0
    every: int = 8
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_list(self.factors)
        super().__post_init__()

    def begin(self, run: TechniqueRun) -> Running:
        return _Pull(self, list(summed_layers(self.factors, self.weights, run)))


class _Pull(RunningPenalty):
    def __init__(
        self, settings: KroneckerPenalty, layers: Sequence[tuple[LayerChange, tuple[Tensor, Tensor]]]
    ) -> None:
        super().__init__(settings)
        self._layers = layers

    def add(self, turn: int, strength: float) -> None:
        for change, (outputs, inputs) in self._layers:
            _, gradient = kronecker_drift(change.matrix(), outputs, inputs)
            for part, own in change.parts(gradient):
                part.add_gradient(own, strength)
