from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.source import WeightSource, chunk_ranges


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
    for name, start, stop in pieces:
        original = base.read_flat(name, start, stop).float()
        deltas = [
            vector.flat(name, start, stop, original) if name in vector else torch.zeros_like(original)
            for vector in vectors
        ]
        device = deltas[0].device if deltas else original.device
        chunk = Chunk(name, original.to(device), [delta.to(device) for delta in deltas], start)
        for accumulator in accumulators:
            accumulator.update(chunk)
