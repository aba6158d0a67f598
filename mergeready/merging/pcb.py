from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.largest import kth_largest, largest
from mergeready.merging.method import ElementwiseMethod, Place, zeros_if_finite
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import can_be_held, kept_count, selection_bytes, top_k, top_ks
from mergeready.weights.source import TensorInfo, chunk_ranges

Array = NDArray[np.float32]
Reader = Callable[[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Range:
    """Two values between which others are clipped and mapped to 0 … 1."""

    low: np.float32
    high: np.float32

    def clip(self, values: Array) -> Array:
        return np.clip(values, self.low, self.high)

    def share(self, values: Array) -> Array:
        """Where between the two a value lies, 0 … 1."""
        share = self.clip(values)
        share -= self.low
        share /= self.high - self.low
        return share


@dataclass(frozen=True, slots=True)
class _Winners:
    """The entries of a whole parameter whose scores count, by rising position, and how much each does."""

    index: NDArray[np.int64]
    share: Array

    @classmethod
    def of(cls, scores: Array, count: int) -> _Winners:
        """Those of the ``count`` highest scores."""
        best = largest(scores, count)
        values = scores.take(best)
        limits = _Range(values.min(initial=np.inf), values.max(initial=-np.inf))
        if limits.low == limits.high:
            return cls(*_winners(scores, limits))
        index, share = _winners(values, limits)
        return cls(best.take(index), share)

    def between(self, start: int, stop: int) -> tuple[NDArray[np.int64], Array]:
        """Those from element ``start`` to ``stop``, counted from there."""
        first, last = np.searchsorted(self.index, [start, stop])
        return self.index[first:last] - start, self.share[first:last]


@register
@dataclass(frozen=True, kw_only=True)
class Pcb(ElementwiseMethod):
    """Parameter competition balancing: the mean of those entries that win, weighted by how clearly they do.

    ``Σ wᵢ sᵢ ∘ τᵢ / Σ |wᵢ| sᵢ``, where ``τᵢ`` is clipped in magnitude and ``sᵢ`` in 0 … 1 comes from the score
    ``exp(N |τᵢ|ₙ²) · tanh(wᵢ τᵢ · Σⱼ wⱼ τⱼ)``: large within its expert (``|τᵢ|ₙ`` is the magnitude mapped to 0 … 1)
    and of one sign with what the experts say together. The ``density`` share of highest scores, mapped to 0 … 1, are
    ``sᵢ``; the others are 0. Du et al., "Parameter Competition Balancing" (arXiv 2410.02396), section 3.2.

    The paper writes both factors as softmax functions; this follows the authors' code (``pcb-merging.py``), with
    three definite choices: ranks are by parameter, not over the whole vector; N counts the experts whose weight is
    not zero; ``wᵢ`` only sets proportions, as in ``ties``. The paper's λ is the engines' ``scale``, 1 to 1.2 there.

    Attributes:
        density: Share of entries that each expert keeps, in (0, 1].
        clip: Share of entries clipped at either end of the magnitudes, in [0, 0.5).
    """

    name: ClassVar[str] = "pcb"
    passes: ClassVar[int] = 12  # of three experts: two more for each further one
    density: float = 0.1
    clip: float = 1e-4

    def __post_init__(self) -> None:
        require_fraction("density", self.density)
        if not isinstance(self.clip, int | float) or not 0 <= self.clip < 0.5:
            raise OptionError(f"`clip` must be in [0, 0.5), not {self.clip!r}.")

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        winners = math.ceil(12 * experts * self.density) + 32 if self.holds(info, experts) else 0
        return super().scratch_bytes(info, experts) + 3 * selection_bytes(info) + winners * info.numel

    def prepare(self, vector: TaskVector, name: str, slot: int) -> _Range:
        info = vector.infos[name]
        clipped = math.floor(self.clip * info.numel)
        if can_be_held(info):
            sizes = np.abs(vector.flat(name, 0, info.numel).cpu().numpy())
            high = kth_largest(sizes, clipped + 1)
            return _Range(low=-kth_largest(np.negative(sizes, out=sizes), clipped + 1), high=high)
        counts = [info.numel - clipped, clipped + 1]
        lowest, highest = top_ks(lambda a, b: vector.flat(name, a, b), info, counts)
        return _Range(low=np.float32(lowest.value), high=np.float32(highest.value))

    def prepare_jointly(
        self, read: Reader, info: TensorInfo, weights: Sequence[float], prepared: Sequence[Any]
    ) -> list[_Range | _Winners | None]:
        """For each expert its winners, or the range of scores that count; None for one that takes no part."""
        weights = _proportions(weights)
        chosen = [i for i, limits in enumerate(prepared) if limits is not None and weights[i] != 0]
        found: list[_Range | _Winners | None] = [None] * len(weights)
        with _quiet():
            if self.holds(info, len(weights)):
                pieces = [(start, stop, _arrays(read(start, stop))) for start, stop in chunk_ranges(info)]
                totals = [_total(deltas, weights) for _, _, deltas in pieces]
                scores, count = np.empty(info.numel, np.float32), kept_count(self.density, info.numel)
                for i in chosen:
                    for (start, stop, deltas), total in zip(pieces, totals, strict=True):
                        scores[start:stop] = _score(deltas[i], total, weights, i, prepared[i])
                    found[i] = _Winners.of(scores, count)
            else:
                for i, limits in self._ranges(read, info, weights, prepared, chosen).items():
                    found[i] = limits
        return found

    def _ranges(
        self,
        read: Reader,
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
        chosen: Sequence[int],
    ) -> dict[int, _Range]:
        highest = dict.fromkeys(chosen, np.float32(-np.inf))
        positive = dict.fromkeys(chosen, 0)
        for start, stop in chunk_ranges(info):
            deltas = _arrays(read(start, stop))
            total = _total(deltas, weights)
            for i in chosen:
                found = _score(deltas[i], total, weights, i, prepared[i])
                highest[i] = np.maximum(highest[i], found.max())
                positive[i] += int(np.count_nonzero(found > 0))

        def scores(i: int, start: int, stop: int) -> Array:
            deltas = _arrays(read(start, stop))
            return _score(deltas[i], _total(deltas, weights), weights, i, prepared[i])

        lowest = {i: _threshold(partial(scores, i), info, self.density, positive[i]) for i in chosen}
        return {i: _Range(lowest[i], highest[i]) for i in chosen}

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        weights = _proportions(weights)
        exact = _arrays(deltas)
        narrow = [delta.astype(np.float32, copy=False) for delta in exact]  # as when scores were compared
        with _quiet():
            merged = zeros_if_finite(deltas).cpu().numpy()  # clipping would hide infinite values
            divisor = np.zeros_like(merged)
            total: Array | None = None
            for i, counted in enumerate(place.joint):
                if isinstance(counted, _Winners):
                    winners, share = counted.between(place.start, place.stop)
                elif counted is not None:
                    total = _total(narrow, weights) if total is None else total
                    winners, share = _winners(_score(narrow[i], total, weights, i, prepared[i]), counted)
                else:
                    continue
                own = exact[i].take(winners)
                clipped = np.sign(own) * prepared[i].clip(np.abs(own))
                merged[winners] += clipped * share * weights[i]
                divisor[winners] += share * abs(weights[i])
            merged /= np.maximum(divisor, divisor.dtype.type(1e-12), out=divisor)
        return torch.from_numpy(merged).to(deltas[0].device)


def _quiet() -> np.errstate:
    """Values that are not finite stay so without a warning; engines name them."""
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


def _proportions(weights: Sequence[float]) -> list[float]:
    """The weights over the mean magnitude of those that are not zero."""
    sizes = [abs(weight) for weight in weights if weight != 0]
    return [weight * len(sizes) / sum(sizes) if sizes else 0.0 for weight in weights]


def _arrays(deltas: Sequence[Tensor]) -> list[Array]:
    return [delta.cpu().numpy() for delta in deltas]


def _total(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += delta if weight == 1 else delta * weight
    return total


def _score(delta: Array, total: Array, weights: Sequence[float], i: int, limits: _Range) -> Array:
    """How clearly each entry of one expert wins, at most ``exp(N)``.

    In numpy, whose functions give an element the same value wherever in an array it stands.
    """
    score: Array = limits.share(np.abs(delta)) if limits.low < limits.high else np.zeros_like(delta)
    np.square(score, out=score)
    score *= float(sum(weight != 0 for weight in weights))
    np.exp(score, out=score)
    agreement = (delta if weights[i] == 1 else delta * weights[i]) * total
    score *= np.tanh(agreement, out=agreement)
    return score


def _threshold(
    scores: Callable[[int, int], Array], info: TensorInfo, density: float, positive: int
) -> np.float32:
    """The lowest of the ``density`` share of highest scores, given how many are positive."""
    count = kept_count(density, info.numel)

    def above_zero(start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.maximum(scores(start, stop), 0))

    def below_zero(start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.minimum(scores(start, stop), 0))

    if count <= positive:
        return np.float32(top_k(above_zero, info, count).value)
    return -np.float32(top_k(below_zero, info, info.numel - count + 1).value)


def _winners(scores: Array, limits: _Range) -> tuple[NDArray[np.int64], Array]:
    """Where scores count, and how much."""
    if limits.low == limits.high:  # a single highest score, or all are equal: those that are positive win
        index = np.flatnonzero((scores >= limits.high) & (scores > 0))
        return index, np.ones(len(index), np.float32)
    index = np.flatnonzero(scores > limits.low)
    return index, limits.share(scores.take(index))
