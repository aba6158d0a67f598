"""How the ranks of a run split the work of a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mergeready.errors import UnsupportedError, listing
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import Held
from mergeready.weights.source import TensorInfo, chunk_ranges

Range = tuple[int, int]


class Shares:
    """Which pieces of each parameter this rank measures: of what it holds, what no other rank measures.

    All ranks' pieces together cover every element exactly once, whatever is sharded, replicated or both, so sums over
    pieces need no correction before they are added up.

    Args:
        infos: The parameters.
        blocks: What this rank holds of each. A block that is no range of elements counts as the whole parameter,
            since it has to be gathered to be read; so does one that is not named.
        ranks: The ranks. A collective where there are several.

    Raises:
        UnsupportedError: If the ranks hold different parameters, or not all of one between them.

    Example:
        >>> import torch
        >>> infos = {"weight": TensorInfo((4, 3), torch.float32)}
        >>> Shares(infos, {}, Ranks.alone()).of("weight")
        [(0, 12)]
    """

    def __init__(self, infos: Mapping[str, TensorInfo], blocks: Mapping[str, Held], ranks: Ranks) -> None:
        spans = {
            name: (blocks[name].span if name in blocks else None) or (0, info.numel)
            for name, info in infos.items()
        }
        spans_of = ranks.each(spans)
        if any(other.keys() != spans.keys() for other in spans_of):
            raise UnsupportedError(
                "the ranks train different parameters, as in pipeline parallelism. Data parallelism, FSDP2 and tensor "
                "parallelism are supported."
            )
        self._pieces: dict[str, list[Range]] = {}
        load, broken = [0] * ranks.size, []
        for name, info in infos.items():
            holders: dict[Range, list[int]] = {}
            for rank, other in enumerate(spans_of):
                holders.setdefault(other[name], []).append(rank)
            if not _covers(holders, info.numel):
                broken.append(name)
            self._pieces[name] = list(_mine(info, holders, load, ranks.rank))
        if broken:
            raise UnsupportedError(f"the ranks hold overlapping or incomplete parts of {listing(broken, 4)}.")

    def of(self, name: str) -> list[Range]:
        """The pieces of one parameter."""
        return self._pieces[name]


def _mine(
    info: TensorInfo, holders: Mapping[Range, list[int]], load: list[int], rank: int
) -> Iterator[Range]:
    """Give each piece to the rank that has least to do of those that hold it; every rank finds the same."""
    for span, candidates in holders.items():
        for start, stop in chunk_ranges(info, span=span):
            chosen = min(candidates, key=lambda candidate: (load[candidate], candidate))
            load[chosen] += stop - start
            if chosen == rank:
                yield start, stop


def _covers(spans: Iterable[Range], numel: int) -> bool:
    """Whether the ranges follow each other from 0 to ``numel``."""
    end = 0
    for start, stop in sorted(span for span in spans if span[1] > span[0]):
        if start != end:
            return False
        end = stop
    return end == numel
