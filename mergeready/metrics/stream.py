from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.source import CHUNK_ELEMENTS, WeightSource, chunk_ranges

_AT_ONCE = 9 * CHUNK_ELEMENTS
_LEAST = 1 << 14


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some elements of one parameter: the base's values and each expert's delta there, fp32, 1-D, one length.

    ``start`` is the place of the first of them in the parameter, in row-major order.
    """

    name: str
    base: Tensor
    deltas: Sequence[Tensor]
    start: int = 0


class Accumulator(ABC):
    """A metric as a sum over pieces of parameters.

    ``sums`` holds everything that was seen, in float64 on the CPU, so that accumulators of different pieces,
    files or shards add up: ``merge`` in one process, one all-reduce over many. Only short sums are fp32, which
    keeps every result accurate to 1e-6.
    """

    sums: Tensor

    @abstractmethod
    def update(self, chunk: Chunk) -> None:
        """Add one piece. Chunks must not be written to."""

    def merge(self, other: Accumulator) -> None:
        """Add what another accumulator of the same kind and layout has seen.

        Raises:
            OptionError: If their layouts differ.
        """
        if type(other) is not type(self) or other._layout() != self._layout():
            raise OptionError(f"a {type(other).__name__} of another layout cannot be added.")
        self.sums += other.sums

    def _layout(self) -> dict[str, object]:
        """What says which number in ``sums`` is which: everything else that the accumulator was made with."""
        return {name: value for name, value in vars(self).items() if name != "sums"}


def accumulate(
    vectors: Sequence[TaskVector],
    base: WeightSource,
    accumulators: Sequence[Accumulator],
    names: Iterable[str] | None = None,
    *,
    pieces: Iterable[tuple[str, int, int]] | None = None,
) -> None:
    """Feed accumulators with every piece of the given parameters, reading each value once.

    Pieces become smaller where there are more than eight task vectors, so that memory, also an accelerator's, does not
    grow with their number.

    Args:
        vectors: Task vectors on one base; where one has no delta, zeros stand in.
        base: The base.
        accumulators: What to update.
        names: Base parameter names; by default all that any of the vectors has.
        pieces: Name, first element and end of each piece to read instead, such as one rank's share of the work.
    """
    if pieces is None:
        wanted = dict.fromkeys(name for vector in vectors for name in vector) if names is None else names
        pieces = ((name, *ends) for name in wanted for ends in chunk_ranges(base.infos[name]))
    for name, start, stop in _narrow(pieces, base, len(vectors)):
        original = base.read_flat(name, start, stop).float()
        deltas = [
            vector.flat(name, start, stop, original) if name in vector else torch.zeros_like(original)
            for vector in vectors
        ]
        device = deltas[0].device if deltas else original.device
        chunk = Chunk(name, original.to(device), [delta.to(device) for delta in deltas], start)
        for accumulator in accumulators:
            accumulator.update(chunk)


def _narrow(
    pieces: Iterable[tuple[str, int, int]], base: WeightSource, count: int
) -> Iterator[tuple[str, int, int]]:
    """The same pieces, cut so that all experts' values of one have room in memory together."""
    limit = max(_AT_ONCE // (1 + count), _LEAST)
    for name, *span in pieces:
        if span[1] - span[0] <= limit:
            yield name, span[0], span[1]
        else:
            for start, stop in chunk_ranges(base.infos[name], limit, (span[0], span[1])):
                yield name, start, stop
