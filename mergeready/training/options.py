from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike
from mergeready.training.peers import Peer
from mergeready.training.picks import Picks
from mergeready.training.policies import Policy
from mergeready.training.probe import Probe
from mergeready.training.schedule import Schedule
from mergeready.weights.open import WeightsLike


class MonitorOptions(TypedDict, total=False):
    """What every shell takes and hands to :class:`~mergeready.training.monitor.Monitor`; see there."""

    base: WeightsLike | Base | None
    peers: Sequence[ExpertLike | Peer]
    probe: Probe | None
    stop: Policy | None
    on_stop: Literal["stop", "record"]
    measure: Schedule
    picks: Picks | None


def with_defaults(options: MonitorOptions) -> MonitorOptions:
    """The options of a shell, which keeps picks unless told otherwise."""
    return {"picks": Picks(), **options}
