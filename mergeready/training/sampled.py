"""Figures for every step, from the coordinates that fingerprints hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mergeready.experts.coordinates import coordinates, sample_count
from mergeready.experts.live import LiveExpert
from mergeready.experts.live_sample import LiveSample
from mergeready.experts.task_vector import require_finite
from mergeready.metrics.estimates import Estimated
from mergeready.metrics.growth import growth_per_step
from mergeready.metrics.sampled import AgainstPeers, Strata
from mergeready.training.peers import OpenPeer, SketchedPeer
from mergeready.training.records import SampledRecord
from mergeready.weights.source import is_mergeable

BUDGET = 2**14
"""Coordinates of the whole base: a cosine's standard error is near 0.01 then."""


class Sampler:
    """Measures a live task vector at a fixed set of coordinates: each costs a gather, and nothing the size of a model.

    Base and peers are read once, when it is made, and only their values at the coordinates are kept, on the CPU. All
    ranks make one together, and measure together.

    Args:
        live: The model in training.
        peers: The open peers.
        sketched: Peers known by fingerprint; where one holds fewer coordinates than ``budget``, so do all.
        budget: Coordinates of the whole base; each parameter has at least 64.
        last: The last such measurement of the run, for the growth.

    Attributes:
        vector: The task vector that it is of; a live model that trains more by now has another.

    Raises:
        UnsupportedError: If an adapter cannot be read at single places.
    """

    def __init__(
        self,
        live: LiveExpert,
        peers: Sequence[OpenPeer],
        sketched: Sequence[SketchedPeer] = (),
        *,
        budget: int = BUDGET,
        last: SampledRecord | None = None,
    ) -> None:
        self._last, self.vector = last, live.vector
        infos = live.base.source.infos
        total = sum(info.numel for name, info in infos.items() if is_mergeable(name, info))
        budget = min([budget, *(peer.fingerprint.budget for peer in sketched)])
        numels = {name: infos[name].numel for name in live.vector if infos[name].numel}
        places = {
            name: coordinates(name, numel, sample_count(numel, total, budget))
            for name, numel in numels.items()
        }
        self._names = list(numels)
        self._sample = LiveSample(live, places)
        self._strata = Strata(list(numels.values()), [len(wanted) for wanted in places.values()])
        self._labels = [*(peer.label for peer in peers), *(peer.label for peer in sketched)]
        rows = [self._sample.of(_reader(peer)) for peer in peers]
        rows += [_from_fingerprint(peer, places) for peer in sketched]
        norms = [peer.norms for peer in peers] + [peer.fingerprint.norms for peer in sketched]
        # Peers may change what does not train here, which counts in a cosine.
        self._shares = [_share(own, self._names) for own in norms]
        self._against = AgainstPeers(self._strata, torch.stack(rows).numpy()) if rows else None

    def measure(self, step: int) -> SampledRecord:
        """Estimate the figures of this moment.

        Args:
            step: The training step, for the record.

        Raises:
            NonFiniteError: If the model holds NaN or infinite values at the coordinates.
        """
        x = self._sample.read().numpy()
        require_finite("the model in training", dict(zip(self._names, self._strata.squared(x), strict=True)))
        norm, last = self._strata.norm(x), self._last
        cosines = [] if self._against is None else self._against.cosines(x)
        conflicts = [] if self._against is None else self._against.sign_conflicts(x)
        cosines = [Estimated(c.value * s, c.error * s) for c, s in zip(cosines, self._shares, strict=True)]
        earlier = (last.step, last.norm) if last is not None and last.step < step else (0, 0.0)
        self._last = SampledRecord(
            step=step,
            norm=norm.value,
            norm_error=norm.error,
            growth=growth_per_step(step, norm.value, *earlier),
            cosine=self._by_peer([found.value for found in cosines]),
            cosine_error=self._by_peer([found.error for found in cosines]),
            sign_conflict=self._by_peer([found.value for found in conflicts]),
            sign_conflict_error=self._by_peer([found.error for found in conflicts]),
        )
        return self._last

    def _by_peer(self, values: Sequence[float]) -> dict[str, float | None]:
        finite = [value if math.isfinite(value) else None for value in values]
        return dict(zip(self._labels, finite, strict=True))


def _reader(peer: OpenPeer) -> Callable[[str, int, int], Tensor]:
    return lambda name, start, stop: (
        peer.flat(name, start, stop) if name in peer else torch.zeros(stop - start)
    )


def _from_fingerprint(peer: SketchedPeer, places: Mapping[str, Tensor]) -> Tensor:
    made, found = peer.fingerprint, []
    for name, wanted in places.items():
        values = made.samples.get(name)
        if values is None:
            values = torch.zeros(len(wanted))
        elif len(values) == made.numel(name):  # all of them, in order
            values = values[wanted]
        found.append(values[: len(wanted)])  # a larger sample begins with a smaller one
    return torch.cat(found).double()


def _share(norms: Mapping[str, float], names: Iterable[str]) -> float:
    """Norm of what is in some parameters, over that of all."""
    inside = math.fsum(norms.get(name, 0.0) ** 2 for name in names)
    return math.sqrt(inside / math.fsum(norm**2 for norm in norms.values()))
