from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, TypedDict

from torch import nn

from mergeready.experts.base import Base
from mergeready.merging.evaluation import Evaluate, Values
from mergeready.training.difficulty.tracker import Difficulty
from mergeready.training.finish import Share
from mergeready.training.masters import MastersLike
from mergeready.training.peers import Peer, PeerLike
from mergeready.training.picks import Picks
from mergeready.training.policies import Policy
from mergeready.training.probe import Probe
from mergeready.training.schedule import Schedule
from mergeready.training.techniques.registry import TechniqueLike
from mergeready.weights.open import WeightsLike


class MonitorOptions(TypedDict, total=False):
    """What every shell takes and hands to :class:`~mergeready.training.monitor.Monitor`; see there."""

    base: WeightsLike | Base | None
    peers: Sequence[PeerLike]
    probe: Probe | None
    stop: Policy | None
    on_stop: Literal["stop", "record"]
    measure: Schedule
    sampled_every: int | None
    picks: Picks | None
    masters: MastersLike | None
    difficulty: Difficulty | bool | None
    techniques: Sequence[TechniqueLike]
    share: Share | None


def with_defaults(options: MonitorOptions) -> MonitorOptions:
    """The options of a shell, which keeps picks unless told otherwise."""
    return {"picks": Picks(), **options}


def evaluating_inside(
    options: MonitorOptions, context: Callable[[], AbstractContextManager[Any]]
) -> MonitorOptions:
    """The options with evaluations that run inside a context, such as a framework's mixed precision.

    Probes are then evaluated as the framework itself validates; measurements stay in full precision.
    """
    changed: MonitorOptions = {**options}
    probe, peers = options.get("probe"), options.get("peers", ())
    if probe is not None and probe.evaluate is not None:
        changed["probe"] = replace(probe, evaluate=_inside(probe.evaluate, context))
    if isinstance(peers, list | tuple):  # anything else is the monitor's to refuse
        changed["peers"] = [
            replace(peer, evaluate=_inside(peer.evaluate, context))
            if isinstance(peer, Peer) and peer.evaluate is not None
            else peer
            for peer in peers
        ]
    return changed


def _inside(evaluate: Evaluate, context: Callable[[], AbstractContextManager[Any]]) -> Evaluate:
    def evaluate_inside(model: nn.Module) -> Mapping[str, Values]:
        with context():
            return evaluate(model)

    return evaluate_inside
