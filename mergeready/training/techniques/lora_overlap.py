from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError, UnsupportedError
from mergeready.experts.delta import Delta, LowRank, dense
from mergeready.experts.svd import thin_svd
from mergeready.training.penalties import overlap
from mergeready.training.techniques.penalty import Penalty, RunningPenalty
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running
from mergeready.training.techniques.trained import Factored, add_to_gradient
from mergeready.weights.shards import held, whole


@register
@dataclass(frozen=True, kw_only=True)
class LoraOverlap(Penalty):
    """Let a LoRA adapter read other inputs than peers' adapters do: ``R = λ Σₜ ‖A Aₜᵀ‖₁`` (O-LoRA).

    Aₜ are the peers' own A; of peers that are no adapters, their leading right singular vectors. Wang et al. (arXiv
    2310.14152), whose scripts use λ = 0.5. Made for learning tasks one after another; no merging figures are published,
    and OSRM's authors argue that orthogonal A are not enough (``start_orthogonal``).

    Cost: one small product a layer, peer and step.

    Attributes:
        strength: λ, at least 0; 0 switches it off.
        every: Steps from one such gradient to the next, at least 1; it is that many times as strong then.

    Example:
        >>> LoraOverlap(strength=0).is_off
        True
    """

    name: ClassVar[str] = "lora_overlap"

    strength: float = 0.5

    def begin(self, run: TechniqueRun) -> Running:
        if not run.peers:
            raise OptionError("lora_overlap needs `peers` with weights.")
        layers = [w for w in run.weights.values() if isinstance(w, Factored) and not w.is_transposed]
        layers = [layer for layer in layers if layer.factors[0].requires_grad]
        if not layers:
            raise UnsupportedError("lora_overlap needs a LoRA adapter whose A trains, on linear layers.")
        pairs = []
        for layer in layers:
            A = layer.factors[0]
            others = [_rows(peer[layer.name], len(A)) for peer in run.peers if layer.name in peer]
            if others:
                pairs.append((layer, [other.to(A.device, torch.float32) for other in others]))
        if not pairs:
            raise MismatchError(
                "no peer changes a layer that the adapter changes: there is no overlap to avoid."
            )
        return _Overlap(self, pairs)


def _rows(delta: Delta, rank: int) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.A.detach()
    return thin_svd(dense(delta).double().cpu(), rank)[2]


class _Overlap(RunningPenalty):
    def __init__(self, settings: LoraOverlap, pairs: Sequence[tuple[Factored, Sequence[Tensor]]]) -> None:
        super().__init__(settings)
        self._pairs = pairs

    def add(self, turn: int, strength: float) -> None:
        for layer, others in self._pairs:
            A = layer.factors[0]
            _, gradient = overlap(whole(A).float(), others)
            add_to_gradient(A, held(A).of(gradient), strength)
