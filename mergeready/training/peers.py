from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from mergeready.errors import MismatchError, NotTrainedError, OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.delta import Delta
from mergeready.experts.fingerprint import Fingerprint, is_fingerprint, open_fingerprint
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import TaskVector, squared_norms
from mergeready.merging.evaluation import Evaluate

logger = logging.getLogger("mergeready")


@dataclass(frozen=True)
class Peer:
    """Another expert on the same base, and how to evaluate its task, if that is known.

    Attributes:
        expert: A folder, hub id, adapter, state dict, module or open expert; or a fingerprint, of which metrics are
            estimated and which takes no part in merges.
        evaluate: Evaluates the peer's own task; probes then show what merging does to it.
        name: What records and figures call it; its path or id by default.
    """

    expert: ExpertLike | Fingerprint
    evaluate: Evaluate | None = None
    name: str | None = None


PeerLike: TypeAlias = ExpertLike | Fingerprint | Peer
"""What runs take for a peer."""


class OpenPeer(TaskVector):
    """A peer's task vector without the parameters that it left unchanged, and its norms, computed once."""

    def __init__(
        self, vector: TaskVector, label: str, squares: dict[str, float], evaluate: Evaluate | None
    ) -> None:
        self.label, self.base, self.evaluate = label, vector.base, evaluate
        self._vector, self.differs_from, self.memory = vector, vector.differs_from, {}
        self.infos = {name: vector.infos[name] for name, value in squares.items() if value > 0}
        self.norms = {name: math.sqrt(squares[name]) for name in self.infos}
        self.norm = math.sqrt(sum(squares.values()))

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._vector.flat(name, start, stop, base)

    def __getitem__(self, name: str) -> Delta:
        if name not in self.infos:
            raise KeyError(name)
        return self._vector[name]


@dataclass(frozen=True, eq=False)
class SketchedPeer:
    """A peer of which only a fingerprint is known: it can be measured against, not merged."""

    label: str
    fingerprint: Fingerprint


def open_sketches(peers: Sequence[PeerLike], base: Base) -> list[SketchedPeer]:
    """Read and check the fingerprints among the peers.

    Raises:
        FormatError: If a file is no fingerprint.
        BaseMismatchError: If one is of another base.
        MismatchError: If one names parameters that the base does not have.
        OptionError: If one comes with an evaluation, for which weights would be needed.
    """
    sketched = []
    for peer in map(_as_peer, peers):
        if not (isinstance(peer.expert, Fingerprint) or is_fingerprint(peer.expert)):
            continue
        made = open_fingerprint(peer.expert, base)
        label = peer.name or made.label
        if peer.evaluate is not None:
            raise OptionError(
                f"peer {label} is a fingerprint, and evaluating a task needs its expert's weights: leave `evaluate` "
                "out, or give the expert itself."
            )
        sketched.append(SketchedPeer(label, made))
    return sketched


def open_peers(peers: Sequence[PeerLike], base: Base) -> list[OpenPeer]:
    """Open all peers that have weights, check them, and measure their norms; fingerprints are passed over.

    Parameters that a peer has beyond the base, such as its own head, stay out of merges and are logged.

    Raises:
        MergeReadyError: As ``open_expert`` does.
        NotTrainedError: If a peer equals the base.
        NonFiniteError: If a peer holds NaN or infinite values.
    """
    opened: list[OpenPeer] = []
    for peer in map(_as_peer, peers):
        if isinstance(peer.expert, Fingerprint) or is_fingerprint(peer.expert):
            continue
        expert = open_expert(peer.expert, base, strict=False)
        label = peer.name or expert.label
        if expert.extra:
            logger.warning("peer %s: not merged, since the base lacks them: %s", label, listing(expert.extra))
        if expert.missing:
            logger.warning(
                "peer %s: counted as unchanged, since it lacks them: %s", label, listing(expert.missing)
            )
        squares = squared_norms(expert.vector)
        if not sum(squares.values()) > 0:
            raise NotTrainedError(f"peer {label} is the base itself: it changes nothing.")
        opened.append(OpenPeer(expert.vector, label, squares, peer.evaluate))
    return opened


def require_own_names(peers: Sequence[OpenPeer | SketchedPeer]) -> None:
    """Raise if two peers have one name.

    Raises:
        OptionError: If so, or if one is called as the run itself.
    """
    labels = [peer.label for peer in peers]
    doubles = sorted({label for label in labels if labels.count(label) > 1} | ({"own"} & set(labels)))
    if doubles:
        raise OptionError(
            f"several peers, or a peer and this run, are called {listing(doubles)}; give them names."
        )


def require_reachable(peers: Sequence[OpenPeer | SketchedPeer], targets: Sequence[str]) -> None:
    """Raise if a peer changes nothing that the model in training has.

    Raises:
        MismatchError: If so.
    """
    for peer in peers:
        changed = list(peer.fingerprint.shapes) if isinstance(peer, SketchedPeer) else list(peer)
        if not set(changed) & set(targets):
            raise MismatchError(
                f"peer {peer.label} changes no parameter of the model: {listing(changed, 3)}."
            )


def _as_peer(given: PeerLike) -> Peer:
    return given if isinstance(given, Peer) else Peer(given)
