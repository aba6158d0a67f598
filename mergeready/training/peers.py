from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergeready.errors import MismatchError, NotTrainedError, OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.delta import Delta
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import TaskVector, squared_norms
from mergeready.merging.evaluation import Evaluate

logger = logging.getLogger("mergeready")


@dataclass(frozen=True)
class Peer:
    """Another expert on the same base, and how to evaluate its task, if that is known.

    Attributes:
        expert: A folder, hub id, adapter, state dict, module or open expert.
        evaluate: Evaluates the peer's own task; probes then show what merging does to it.
        name: What records and figures call it; its path or id by default.
    """

    expert: ExpertLike
    evaluate: Evaluate | None = None
    name: str | None = None


class OpenPeer(TaskVector):
    """A peer's task vector without the parameters that it left unchanged, and its norms, computed once."""

    def __init__(
        self, vector: TaskVector, label: str, squares: dict[str, float], evaluate: Evaluate | None
    ) -> None:
        self.label, self.base, self.evaluate = label, vector.base, evaluate
        self._vector, self.differs_from, self.memory = vector, vector.differs_from, {}
        self.infos = {name: vector.infos[name] for name, value in squares.items() if value > 0}
        self.norm = math.sqrt(sum(squares.values()))

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._vector.flat(name, start, stop, base)

    def __getitem__(self, name: str) -> Delta:
        if name not in self.infos:
            raise KeyError(name)
        return self._vector[name]


def open_peers(peers: Sequence[ExpertLike | Peer], base: Base) -> list[OpenPeer]:
    """Open all peers, check them, and measure their norms.

    Parameters that a peer has beyond the base, such as its own head, stay out of merges and are logged.

    Raises:
        MergeReadyError: As ``open_expert`` does.
        NotTrainedError: If a peer equals the base.
        NonFiniteError: If a peer holds NaN or infinite values.
        OptionError: If two peers have one name.
    """
    opened: list[OpenPeer] = []
    for given in peers:
        peer = given if isinstance(given, Peer) else Peer(given)
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
    labels = [peer.label for peer in opened]
    doubles = sorted({label for label in labels if labels.count(label) > 1} | ({"own"} & set(labels)))
    if doubles:
        raise OptionError(
            f"several peers, or a peer and this run, are called {listing(doubles)}; give them names."
        )
    return opened


def require_reachable(peers: Sequence[OpenPeer], targets: Sequence[str]) -> None:
    """Raise if a peer changes nothing that the model in training has.

    Raises:
        MismatchError: If so.
    """
    for peer in peers:
        if not set(peer) & set(targets):
            raise MismatchError(f"peer {peer.label} changes no parameter of the model: {listing(peer, 3)}.")
