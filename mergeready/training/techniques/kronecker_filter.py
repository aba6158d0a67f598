from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.factors import KroneckerFactors
from mergeready.training.kronecker_filter import Leading, filtering, leading
from mergeready.training.techniques.layer_change import LayerChange, require_list, summed_layers
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch


@register
@dataclass(frozen=True, kw_only=True)
class KroneckerFilter(Technique):
    """Every k-th step, take out of the task vector what peers are sensitive to: ``τ ← (I + λ k · B ⊗ A)⁻¹ τ``.

    What ``kronecker_penalty`` is to the loss, this is to the weights, as AdamW's decay is to L2: after the update, D,
    the change of a layer's weight and bias, is replaced with what minimises ``‖E − D‖² + λ k tr(B E A Eᵀ)``, with
    ``B ⊗ A`` the sum of the peers' factors (``mergeready factors`` makes them from their data once; no data are
    shared). Adam's second moments do not see it, it is stable for any λ, and it may come rarely. Directions that no
    peer cares about are free. Parameters without factors (norms, embeddings, convolutions, the task's head) are left
    alone. A proximal step on the penalty of TAK (arXiv 2602.17385), which takes gradients; no published figures.
    Among eight text encoders, merges by task arithmetic and TIES gained much, among six less, and experts lost little
    (docs/results.md); the defaults are what was measured. Tune the merge scale, as task vectors become shorter.

    B and A are seen in their ``rank`` leading eigenvectors and one eigenvalue for all the rest.

    Cost: leading eigenvectors at the start; thin products of matrices and ``rank`` vectors a side of each layer, in
    memory as well. Of a sharded model, every rank gathers one layer's change at a time.

    Not for adapters, whose change would not keep its rank: use ``kronecker_penalty`` there.

    Attributes:
        factors: One for each peer: files, or what ``kronecker_factors`` returned. On this run's base.
        strength: λ, a step, at least 0; 0 switches it off.
        every: k, steps from one time to the next, at least 1.
        rank: Eigenvectors of B and of A, at least 1.
        weights: One λₜ a peer, see ``sum_factors``; 1/T each by default.

    Example:
        >>> KroneckerFilter(factors=["law.factors.safetensors"], strength=0).is_off
        True
    """

    name: ClassVar[str] = "kronecker_filter"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.WEIGHTS})

    factors: Sequence[str | Path | KroneckerFactors]
    strength: float = 0.25
    every: int = 16
    rank: int = 64
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_list(self.factors)
        problems = []
        if not 0 <= self.strength < math.inf:
            problems.append(f"`strength` must be a number of at least 0, not {self.strength}")
        if self.every < 1:
            problems.append(f"`every` must be at least 1, not {self.every}")
        if self.rank < 1:
            problems.append(f"`rank` must be at least 1, not {self.rank}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @property
    def is_off(self) -> bool:
        return self.strength == 0

    def conflict(self, other: Technique) -> str | None:
        if other.name == "sparse_mask":
            return "kronecker_filter would move weights that the mask keeps at the base"
        return None

    def begin(self, run: TechniqueRun) -> Running:
        if run.live.is_peft:
            raise UnsupportedError(
                "kronecker_filter is for models that are trained whole: an adapter's change would not keep its rank. "
                "Use kronecker_penalty."
            )
        layers = [
            (change, leading(outputs, self.rank), leading(inputs, self.rank))
            for change, (outputs, inputs) in summed_layers(self.factors, self.weights, run)
        ]
        return _Filter(self, layers)


class _Filter(Running):
    def __init__(
        self, settings: KroneckerFilter, layers: Sequence[tuple[LayerChange, Leading, Leading]]
    ) -> None:
        self._every, self._strength = settings.every, settings.strength * settings.every
        self._layers = layers

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if step % self._every:
            return
        for layer, outputs, inputs in self._layers:
            beyond = filtering(layer.matrix(), outputs, inputs, self._strength)
            for part, own in layer.parts(beyond):
                part.target.add_(own.to(part.target.dtype))
