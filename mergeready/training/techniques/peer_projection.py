from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import nn

from mergeready.errors import MismatchError, OptionError, listing
from mergeready.experts.svd import thin_svd
from mergeready.training.projection import Sides, Subspaces, peer_subspaces, sketched_right
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.techniques.trained import Factored, Trained
from mergeready.weights.shards import held, local, whole


@register
@dataclass(frozen=True, kw_only=True)
class PeerProjection(Technique):
    """After every step, take out of the task vector what lies in the subspaces that peers use most.

    ``τ ← (I − U Uᵀ) τ (I − V Vᵀ)`` for each matrix, U and V the leading singular vectors of the peers' changes; by
    default V alone, the inputs that peers read. Of a LoRA adapter, A and B are projected, which is the same. Of a peer
    that is known by fingerprint only there is a sketch of V, which finds 64 / columns of it (17 % at 384 columns), and
    helps that little.
    Parameters that are no matrices are left alone. No published figures: an experiment.

    Cost: two thin products of matrices a parameter and step; bases of rank × peers vectors. Of a sharded model, every
    rank gathers one parameter's change at a time.

    Attributes:
        rank: Singular vectors of each peer.
        sides: ``right``, ``left`` or ``either``.

    Example:
        >>> PeerProjection(rank=4).sides
        'right'
    """

    name: ClassVar[str] = "peer_projection"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.WEIGHTS})

    rank: int = 8
    sides: Sides = "right"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"`rank` must be at least 1, not {self.rank}.")
        if self.sides not in get_args(Sides):
            raise OptionError(f"`sides` must be one of {', '.join(get_args(Sides))}, not {self.sides!r}.")

    def begin(self, run: TechniqueRun) -> Running:
        if not (run.peers or run.sketched):
            raise OptionError("peer_projection needs `peers`.")
        weights = {name: weight for name, weight in run.weights.items() if len(weight.block.shape) == 2}
        pairs = [(weight, self._subspaces(name, weight, run)) for name, weight in weights.items()]
        pairs = [
            (weight, found) for weight, found in pairs if found.left is not None or found.right is not None
        ]
        full = [
            weight.name
            for weight, found in pairs
            if (found.left is not None and found.left.shape[1] >= weight.block.shape[0])
            or (found.right is not None and found.right.shape[1] >= weight.block.shape[1])
        ]
        if full or not pairs:
            what = (
                f"leave nothing to train in {', '.join(full[:4])}"
                if full
                else "change no matrix that trains here"
            )
            raise MismatchError(f"the peers' subspaces {what}: choose a smaller `rank`, or other peers.")
        _require_trained(pairs)
        return _Projection(pairs)

    def _subspaces(self, name: str, weight: Trained, run: TechniqueRun) -> Subspaces:
        deltas = [peer.get(name) for peer in run.peers]
        found = peer_subspaces(deltas, self.rank, self.sides)
        right = [] if found.right is None else [found.right]
        if self.sides != "left":
            sketches = [peer.fingerprint.subspaces.get(name) for peer in run.sketched]
            columns = weight.block.shape[1]
            right += [sketched_right(name, columns, s[: self.rank]) for s in sketches if s is not None]
        device = weight.target.device
        joined = thin_svd(torch.cat(right, dim=1).double())[0].float().to(device) if right else None
        return Subspaces(None if found.left is None else found.left.to(device), joined)


class _Projection(Running):
    def __init__(self, pairs: Sequence[tuple[Trained, Subspaces]]) -> None:
        self._pairs = pairs

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, subspaces in self._pairs:
            if isinstance(weight, Factored):
                for factor, part in _factor_parts(weight, subspaces):
                    local(factor).copy_(held(factor).of(part.remove(whole(factor).float())))
            else:
                change = weight.whole_delta()
                beyond = weight.block.of(subspaces.remove(change) - change)
                weight.target.add_(beyond.to(weight.target.dtype))


def _factor_parts(weight: Factored, subspaces: Subspaces) -> list[tuple[nn.Parameter, Subspaces]]:
    """The factors that have to be projected, and with what."""
    A, B = weight.factors
    left, right = subspaces.left, subspaces.right
    if weight.is_transposed:  # the change is (B A)ᵀ
        left, right = right, left
    parts = []
    if right is not None:
        parts.append((A, Subspaces(right=right)))
    if left is not None:
        parts.append((B, Subspaces(left=left)))
    return parts


def _require_trained(pairs: Sequence[tuple[Trained, Subspaces]]) -> None:
    frozen = [
        weight.name
        for weight, subspaces in pairs
        if isinstance(weight, Factored)
        and any(not factor.requires_grad for factor, _ in _factor_parts(weight, subspaces))
    ]
    if frozen:
        raise OptionError(
            f"peer_projection would change factors that are frozen, as a shared A is: {listing(frozen, 4)}. Choose "
            "other `sides`."
        )
