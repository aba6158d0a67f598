"""The live task vector against peers that are known by fingerprint only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.estimates import Estimated, estimate_cosine, estimate_sign_conflict
from mergeready.training.peers import SketchedPeer

_UNKNOWN = Estimated(math.nan, math.nan)


def sample_counts(fingerprints: Iterable[Fingerprint]) -> dict[str, int]:
    """How many coordinates of each parameter some fingerprint holds at most: larger samples begin with smaller ones."""
    counts: dict[str, int] = {}
    for made in fingerprints:
        for name, values in made.samples.items():
            counts[name] = max(counts.get(name, 0), len(values))
    return counts


def estimate_all(
    norms: Mapping[str, float], samples: Mapping[str, Tensor], peers: Sequence[SketchedPeer]
) -> dict[str, tuple[Estimated, Estimated]]:
    """Cosine and sign conflict of a task vector with each peer; NaN while the task vector is zero.

    Args:
        norms: Norm of each parameter's delta, exact, of everything that the task vector changes.
        samples: Its values at the coordinates that fingerprints hold, as many as any of the peers has.
        peers: The peers.
    """
    changed = {name: norm for name, norm in norms.items() if norm > 0}
    estimates: dict[str, tuple[Estimated, Estimated]] = {}
    for peer in peers:
        other = peer.fingerprint
        if not changed:
            estimates[peer.label] = (_UNKNOWN, _UNKNOWN)
            continue
        shared = {name: shape for name, shape in other.shapes.items() if name in changed}
        own = Fingerprint(
            label="this run",
            base=other.base,
            shapes=shared,
            norms=changed,
            samples={name: samples[name] for name in shared},
            subspaces={},
            total=other.total,
            budget=other.budget,
        )
        estimates[peer.label] = (estimate_cosine(own, other), estimate_sign_conflict(own, other))
    return estimates
