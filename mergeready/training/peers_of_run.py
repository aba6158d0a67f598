from __future__ import annotations

import logging
from collections.abc import Sequence

from mergeready.errors import listing
from mergeready.experts.live import LiveExpert
from mergeready.training.agreement import agreed
from mergeready.training.peers import (
    OpenPeer,
    PeerLike,
    SketchedPeer,
    open_peers,
    open_sketches,
    require_own_names,
    require_reachable,
)
from mergeready.weights.ranks import Ranks

logger = logging.getLogger("mergeready")


def peers_of_run(
    given: Sequence[PeerLike], live: LiveExpert, ranks: Ranks, *, probed: bool
) -> tuple[list[OpenPeer], list[SketchedPeer]]:
    """Open a run's peers, on every rank alike: those with weights, and those that are known by fingerprint.

    Evaluations of theirs have to agree over ranks from then on.

    Args:
        given: What the user named.
        live: The model in training, which they must have something in common with.
        ranks: The processes of the run.
        probed: Whether the run probes, and fingerprints are told to stay out of it.

    Raises:
        MergeReadyError: If one cannot be opened, two have one name, or one changes nothing that the model has.
    """
    with live.base_readable(), ranks.together():
        peers, sketched = open_peers(given, live.base), open_sketches(given, live.base)
        require_own_names([*peers, *sketched])
        require_reachable([*peers, *sketched], list(live.targets))
    if sketched and probed:
        logger.info(
            "peers known by fingerprint are measured, not merged: %s%s",
            listing([peer.label for peer in sketched]),
            "" if peers else "; probes use surrogates",
        )
    for peer in peers:
        if peer.evaluate is not None:
            peer.evaluate = agreed(peer.evaluate, ranks)
    return peers, sketched
