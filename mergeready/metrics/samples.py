from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergeready.experts.coordinates import coordinates
from mergeready.metrics.stream import Accumulator, Chunk
from mergeready.weights.source import TensorInfo


class SampleAccumulator(Accumulator):
    """Values of the first task vector of each chunk at the coordinates that fingerprints hold.

    Each coordinate is in one piece only, so sums over shards and ranks put the sample together.

    Args:
        infos: The parameters that will be seen.
        counts: How many coordinates of each are wanted; those that are not named are passed over.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], counts: Mapping[str, int]) -> None:
        self._counts = {name: counts[name] for name in infos if counts.get(name)}
        drawn = {name: coordinates(name, infos[name].numel, count) for name, count in self._counts.items()}
        self._wanted: dict[str, tuple[Tensor, Tensor]] = {
            name: torch.sort(places) for name, places in drawn.items()
        }
        self._first: dict[str, int] = {}
        end = 0
        for name, count in self._counts.items():
            self._first[name], end = end, end + count
        self.sums = torch.zeros(end, dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        if chunk.name not in self._counts:
            return
        wanted, order = self._wanted[chunk.name]
        delta = chunk.deltas[0]
        first, last = torch.searchsorted(
            wanted, torch.tensor([chunk.start, chunk.start + len(delta)])
        ).tolist()
        values = delta[(wanted[first:last] - chunk.start).to(delta.device)].cpu().double()
        self.sums[self._first[chunk.name] + order[first:last]] += values

    def samples(self) -> dict[str, Tensor]:
        """The sample of each parameter, fp32, in the order of :func:`~mergeready.experts.coordinates.coordinates`."""
        pieces = torch.split(self.sums.float(), list(self._counts.values()))
        return dict(zip(self._counts, pieces, strict=True))

    def _layout(self) -> dict[str, object]:
        return {"counts": self._counts}  # from which all else follows
