from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError
from mergeready.experts.factors import FactoredLayer, KroneckerFactors, open_factors, sum_factors
from mergeready.training.penalties import kronecker_drift
from mergeready.training.techniques.penalty import Penalty, RunningPenalty
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running
from mergeready.training.techniques.trained import Trained


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
        if isinstance(self.factors, str | Path | KroneckerFactors) or not self.factors:
            raise OptionError("`factors` must be a list of files of peers' factors, with one at least.")
        super().__post_init__()

    def begin(self, run: TechniqueRun) -> Running:
        opened = [open_factors(given, run.live.base) for given in self.factors]
        total = sum_factors(opened, self.weights)
        layers = [
            _Layer(layer, run.weights.get(name), run.weights.get(layer.bias or ""), total.read(name))
            for name, layer in total.layers.items()
            if name in run.weights or layer.bias in run.weights
        ]
        if not layers:
            raise MismatchError(f"the factors {total.label} are of no layer that trains in this run.")
        return _Pull(self, layers)


class _Layer:
    """A layer whose weight, bias or both train, and the factors where they are needed."""

    def __init__(
        self,
        layer: FactoredLayer,
        weight: Trained | None,
        bias: Trained | None,
        factors: tuple[Tensor, Tensor],
    ) -> None:
        self._layer, self._weight, self._bias = layer, weight, bias if layer.bias is not None else None
        self.parts = [part for part in (self._weight, self._bias) if part is not None]
        device = self.parts[0].target.device
        self._outputs, self._inputs = (factor.to(device) for factor in factors)

    def add(self, strength: float) -> None:
        """Add the gradient."""
        layer = self._layer
        if self._weight is None:
            weight = torch.zeros(layer.weight_shape, device=self._inputs.device)
        else:
            weight = self._weight.whole_delta()
        bias = None if self._bias is None else self._bias.whole_delta()
        _, gradient = kronecker_drift(layer.matrix(weight, bias), self._outputs, self._inputs)
        if self._weight is not None:
            own = gradient[:, : layer.inputs]
            self._weight.add_gradient(self._weight.block.of(own.T if layer.transposed else own), strength)
        if self._bias is not None:
            self._bias.add_gradient(self._bias.block.of(gradient[:, layer.inputs]), strength)


class _Pull(RunningPenalty):
    def __init__(self, settings: KroneckerPenalty, layers: Sequence[_Layer]) -> None:
        super().__init__(settings)
        self._layers = layers

    def add(self, turn: int, strength: float) -> None:
        for layer in self._layers:
            layer.add(strength)
