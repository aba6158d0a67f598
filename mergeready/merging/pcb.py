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
from mergeready.merging.method import ElementwiseMethod, Place
from mergeready.merging.registry import register, require_fraction
from mergeready.merging.selection import can_be_held, kept_count, selection_bytes, top_k, top_ks
from mergeready.weights.source import TensorInfo, chunk_ranges

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Range:
    """Two values between which others are clipped and mapped to 0 … 1."""

    low: np.float32
    high: np.float32

    def clip(self, values: Array) -> Array:
        return np.clip(values, self.low, self.high)

    def share(self, values: Array) -> Array:
        """Where between the two a value lies, 0 … 1."""
        share: Array = (self.clip(values) - self.low) / (self.high - self.low)
        return share


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
        return super().scratch_bytes(info, experts) + 3 * selection_bytes(info)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> _Range:
        info = vector.infos[name]
        clipped = math.floor(self.clip * info.numel)

        counts = [info.numel - clipped, clipped + 1]
        low, high = top_ks(lambda a, b: vector.flat(name, a, b), info, counts)
        return _Range(low=np.float32(low.value), high=np.float32(high.value))

    def prepare_jointly(
        self,
        read: Callable[[int, int], list[Tensor]],
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
    ) -> list[_Range | None]:
        """The range of scores that count, for each expert; None for one that takes no part."""
        weights = _proportions(weights)
        chosen = [i for i, limits in enumerate(prepared) if limits is not None and weights[i] != 0]
        highest = dict.fromkeys(chosen, np.float32(-np.inf))
        positive = dict.fromkeys(chosen, 0)

        kept: dict[int, list[Array]] = {i: [] for i in chosen} if can_be_held(info, len(chosen)) else {}

        def scores(i: int, start: int, stop: int) -> Array:
            if i in kept:
                return kept[i][0][start:stop]
            deltas = [delta.cpu().numpy() for delta in read(start, stop)]
            return _score(deltas[i], _total(deltas, weights), weights, i, prepared[i])

        with _quiet():
            for start, stop in chunk_ranges(info):
                deltas = [delta.cpu().numpy() for delta in read(start, stop)]
                total = _total(deltas, weights)
                for i in chosen:
                    found = _score(deltas[i], total, weights, i, prepared[i])
                    highest[i] = np.maximum(highest[i], found.max())
                    positive[i] += int(np.count_nonzero(found > 0))
                    if i in kept:
                        kept[i].append(found)
            kept = {i: [np.concatenate(pieces)] for i, pieces in kept.items()}
            lowest = {i: _threshold(partial(scores, i), info, self.density, positive[i]) for i in chosen}
        return [_Range(lowest[i], highest[i]) if i in lowest else None for i in range(len(weights))]

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        weights = _proportions(weights)
        exact = [delta.cpu().numpy() for delta in deltas]
        narrow = [delta.astype(np.float32, copy=False) for delta in exact]  # as when the ranges were found
        with _quiet():
            total = _total(narrow, weights)
            merged = exact[0] * 0
            for delta in exact:
                merged += delta * 0  # NaN where a value is infinite, which clipping must not hide
            divisor = np.zeros_like(merged)
            for i, counted in enumerate(place.joint):
                if counted is not None:
                    share = _shares(_score(narrow[i], total, weights, i, prepared[i]), counted)
                    clipped = np.sign(exact[i]) * prepared[i].clip(np.abs(exact[i]))
                    merged += clipped * share * weights[i]
                    divisor += share * abs(weights[i])
            merged /= np.maximum(divisor, 1e-12)
        return torch.from_numpy(merged).to(deltas[0].device)


def _quiet() -> np.errstate:
    """Values that are not finite stay so without a warning; engines name them."""
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


def _proportions(weights: Sequence[float]) -> list[float]:
    """The weights over the mean magnitude of those that are not zero."""
    sizes = [abs(weight) for weight in weights if weight != 0]
    return [weight * len(sizes) / sum(sizes) if sizes else 0.0 for weight in weights]


def _total(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += delta * weight
    return total


def _score(delta: Array, total: Array, weights: Sequence[float], i: int, limits: _Range) -> Array:
    """How clearly each entry of one expert wins, at most ``exp(N)``.

    In numpy, whose functions give an element the same value wherever in an array it stands.
    """
    count = float(sum(weight != 0 for weight in weights))
    size = limits.share(np.abs(delta)) if limits.low < limits.high else np.zeros_like(delta)
    score: Array = np.exp(count * np.square(size)) * np.tanh(delta * weights[i] * total)
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


def _shares(scores: Array, limits: _Range) -> Array:
    if limits.low == limits.high:  # a single highest score, or all are equal: those that are positive win
        return ((scores >= limits.high) & (scores > 0)).astype(np.float32)
    return limits.share(scores)
