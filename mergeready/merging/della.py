from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector, has_room
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.random_mask import LEVELS, random_numbers
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.row_order import row_order
from mergeready.merging.ties import elect_and_average
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo

_MOST_REMEMBERED = 2**26  # 128 MiB an expert


@dataclass
class _Rows:
    """One expert's parameter as rows: enough to rank a piece of it within whole rows, wherever it was cut."""

    vector: TaskVector
    name: str
    slot: int
    width: int
    table: Tensor
    """At each rank, the largest random number that keeps an element: its probability · 65536 − 1, 16 bits."""
    last: tuple[tuple[int, int], Tensor] = field(default=((0, 0), torch.empty(0)))
    known: dict[tuple[int, int], Tensor] | None = None
    """Probabilities of what is kept in 1/65536 and 0 for what is dropped, by range, where they never change."""

    def factors(self, chunk: Tensor, place: Place, seed: int) -> Tensor:
        """What to multiply each element with: 0 to drop it, else what makes up for its chance to be dropped."""
        known = None if self.known is None else self.known.get((place.start, place.stop))
        if known is not None:
            return torch.div(LEVELS, known.to(chunk.dtype)).nan_to_num_(posinf=0.0)
        numbers = random_numbers(
            seed=seed, slot=self.slot, name=place.name, start=place.start, stop=place.stop
        )
        most = self.most(chunk, place).numpy().view(np.uint16)
        kept = numbers <= most
        if self.known is not None:
            self.known[place.start, place.stop] = torch.from_numpy((most + np.uint16(1)) * kept)
        levels = torch.from_numpy(most.astype(np.float32)).add_(1).to(chunk.dtype)
        # torch converts bytes, not booleans, several at a time
        return torch.div(LEVELS, levels).mul_(torch.from_numpy(kept.view(np.uint8)).to(chunk.dtype))

    def most(self, chunk: Tensor, place: Place) -> Tensor:
        """Each element's entry in the table."""
        first = place.start // self.width * self.width
        stop = -(-place.stop // self.width) * self.width
        if (first, stop) == (place.start, place.stop):
            return _by_rank(chunk, self.width, self.table)
        (known, most) = self.last
        if known != (first, stop):  # the pieces of a row that is longer than a chunk come one after another
            most = _by_rank(self.vector.flat(self.name, first, stop), self.width, self.table)
            self.last = ((first, stop), most)
        return most[place.start - first : place.stop - first]


def _width(info: TensorInfo) -> int:
    return info.numel // max(info.rows, 1) if len(info.shape) > 1 else info.numel


def _may_remember(vector: TaskVector, info: TensorInfo) -> bool:
    """Whether what is dropped of a parameter may be remembered: within a bound for each task vector."""
    return vector.memory is not None and has_room(vector.memory, "della", info.numel, _MOST_REMEMBERED)


def _by_rank(values: Tensor, width: int, table: Tensor) -> Tensor:
    order = row_order(values.float().reshape(-1, width))
    return (
        torch.empty(order.shape, dtype=table.dtype).scatter_(1, order, table.expand(order.shape)).reshape(-1)
    )


@dataclass(frozen=True, kw_only=True)
class _Della(ElementwiseMethod):
    density: float = 0.7
    epsilon: float = 0.07
    seed: int = 0

    def __post_init__(self) -> None:
        require_fraction("density", self.density)
        require_fraction("epsilon", self.epsilon, zero=True)
        if self.density < 1 and not self.epsilon < self.density <= 1 - self.epsilon:
            most = min(self.density, 1 - self.density)
            raise OptionError(
                f"`density` ± `epsilon` must stay in (0, 1]: with density {self.density}, epsilon must be at most "
                f"{most:g} and below the density, not {self.epsilon}."
            )

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        # Keys, order and levels of a piece or, if that is longer, a row, whose levels are kept for each expert.
        return super().scratch_bytes(info, experts) + max(
            min(info.numel, CHUNK_ELEMENTS), _width(info)
        ) * 4 * (experts + 10)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> _Rows:
        info = vector.infos[name]
        width = _width(info)
        rows = _Rows(vector, name, slot, width, self._table(width))
        # Levels and 0, for what is dropped, have to fit into 16 bits.
        fits = round((self.density + self.epsilon) * LEVELS) < LEVELS
        if fits and _may_remember(vector, info):
            rows.known = {}
        return rows

    def _table(self, width: int) -> Tensor:
        """See :class:`_Rows`; the bits of unsigned numbers as signed ones, which torch can move."""
        low, high = self.density - self.epsilon, self.density + self.epsilon
        kept = (
            torch.linspace(low, high, width, dtype=torch.float64)
            if width > 1
            else torch.tensor([self.density])
        )
        levels = kept.mul(LEVELS).round().clamp(1, LEVELS)
        return torch.from_numpy((levels.numpy() - 1).astype(np.uint16).view(np.int16))

    def _drop(self, deltas: Sequence[Tensor], prepared: Sequence[Any], place: Place) -> None:
        """Drop entries at random, small ones more often, and divide the rest by its probability; in place."""
        if self.density == 1:
            return
        for delta, rows in zip(deltas, prepared, strict=True):
            if rows is None:
                continue
            delta.mul_(rows.factors(delta, place, self.seed).to(delta.device))


@register
@dataclass(frozen=True, kw_only=True)
class DellaLinear(_Della):
    """Drop small entries more often than large ones, rescale, then the weighted sum: ``Σ wᵢ mᵢ ∘ τᵢ / pᵢ``.

    ``mᵢ ~ Bernoulli(pᵢ)``, where ``pᵢ`` rises linearly with the rank of |τᵢ| within its row, from
    ``density - epsilon`` for the smallest to ``density + epsilon`` for the largest. Deep et al., "DELLA-Merging"
    (arXiv 2406.11617), MagPrune; its drop rate is ``1 - density``, and ``window_size`` in the authors' code is
    ``2 · epsilon``. As there, what is kept is divided by its own probability, which keeps the mean. A row
    is the first dimension by all others together; a parameter of one dimension is one row. Equal magnitudes rank by
    position. Masks depend on the seed, the parameter's name and the expert's position only.

    Attributes:
        density: Mean share of entries kept, in (0, 1]. The defaults are those of the authors' example. At 1 nothing is
            dropped.
        epsilon: Half the range of probabilities; ``density ± epsilon`` must stay in (0, 1].
        seed: Seed of the masks.
    """

    name: ClassVar[str] = "della_linear"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        self._drop(deltas, prepared, place)
        return weighted_sum(deltas, weights)


@register
@dataclass(frozen=True, kw_only=True)
class Della(_Della):
    """Drop small entries more often than large ones and rescale, then sign election and the mean of what agrees.

    The first step is that of ``della_linear``, the others are those of ``ties``; see there for formulas and
    sources.

    Attributes:
        density: Mean share of entries kept, in (0, 1]. At 1 nothing is dropped.
        epsilon: Half the range of probabilities; ``density ± epsilon`` must stay in (0, 1].
        seed: Seed of the masks.
    """

    name: ClassVar[str] = "della"

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        self._drop(deltas, prepared, place)
        return elect_and_average(deltas, weights)
