"""Sampled coordinates of many experts side by side, read from their fingerprints when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import MismatchError, listing
from mergeready.experts.base import Base
from mergeready.experts.coordinates import coordinates, sample_count
from mergeready.experts.fingerprint import Fingerprint, open_fingerprint
from mergeready.metrics.estimates import require_same_base
from mergeready.weights.safetensors_file import SafetensorsFile


@dataclass(frozen=True, eq=False)
class Sampled:
    """An expert of which a fingerprint exists, without what thousands of them would have no room for.

    Attributes:
        label: The expert.
        norm: ‖τ‖.
        numels: Elements of each of its parameters; one mapping for all experts that change the same ones.
        norms: ‖τ‖ of each, in that order.
        total: Elements of the base.
        budget: Coordinates of the whole fingerprint.
        given: Where the samples are.
    """

    label: str
    norm: float
    numels: Mapping[str, int]
    norms: NDArray[np.float64]
    total: int
    budget: int
    given: str | Path | Fingerprint

    def samples(self) -> Tensor:
        """All samples one after the other, bf16 from a file."""
        if isinstance(self.given, Fingerprint):
            return torch.cat(list(self.given.samples.values()))
        file = SafetensorsFile(Path(self.given))
        return file.read_flat("samples", 0, sum(self.counts()))

    def counts(self) -> list[int]:
        """How many of them each parameter has."""
        return [sample_count(numel, self.total, self.budget) for numel in self.numels.values()]


def open_sampled(given: Sequence[str | Path | Fingerprint], base: Base | None = None) -> list[Sampled]:
    """Check fingerprints against a base, or against the first of them, and keep what fits into memory.

    Raises:
        FormatError: If a file is no fingerprint.
        BaseMismatchError: If the bases differ.
        MismatchError: If one does not fit the base's shapes, or two disagree on a parameter's size; all are listed.
    """
    experts: list[Sampled] = []
    first: Fingerprint | None = None
    seen: dict[str, int] = {}
    known: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}
    odd: set[str] = set()
    for one in given:
        if base is not None:
            made = open_fingerprint(one, base)
        else:
            made = one if isinstance(one, Fingerprint) else Fingerprint.load(one)
        first = first or made
        require_same_base(first, made)
        numels = {name: made.numel(name) for name in made.shapes}
        odd |= {name for name, numel in numels.items() if seen.setdefault(name, numel) != numel}
        numels = known.setdefault(tuple(numels.items()), numels)  # type: ignore[assignment]  # equal to it
        norms = np.array([made.norms[name] for name in numels])
        experts.append(Sampled(made.label, made.norm, numels, norms, made.total, made.budget, one))
    if odd:
        raise MismatchError(
            f"fingerprints of one base disagree on the size of {listing(sorted(odd))}. Take them again."
        )
    return experts


@dataclass(frozen=True)
class Place:
    """Where one parameter's coordinates are: columns ``start`` to ``stop``, of ``numel`` elements; its share of all."""

    start: int
    stop: int
    numel: int
    share: float

    @property
    def count(self) -> int:
        """How many coordinates of it are compared."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Which columns hold which parameter, for all experts alike."""

    names: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def width(self) -> int:
        """Columns in all."""
        return self.places[-1].stop if self.places else 0

    @classmethod
    def of(cls, experts: Sequence[Sampled]) -> Layout:
        """Columns for every parameter that any expert changes, as many as the smallest budget gives."""
        numels: dict[str, int] = {}
        for known in {id(expert.numels): expert.numels for expert in experts}.values():
            numels = {**known, **numels}
        total = experts[0].total
        budget = min(expert.budget for expert in experts)
        places, start = [], 0
        for numel in numels.values():
            stop = start + sample_count(numel, total, budget)
            places.append(Place(start, stop, numel, numel / max(total, 1)))
            start = stop
        return cls(tuple(numels), tuple(places))


class SampledBlock:
    """Samples of some experts, one a row.

    Attributes:
        values: The samples, bf16, shape (experts, columns); zero where an expert leaves a parameter as it is.
        weights: ‖τₚ‖ / ‖τ‖ of each expert and parameter.
        scales: What makes an expert's sample of a parameter a unit vector; 0 where all of it is zero.
        fourth: Σ x⁴ of those unit vectors.
    """

    def __init__(self, experts: Sequence[Sampled], layout: Layout) -> None:
        self.values = torch.zeros(len(experts), layout.width, dtype=torch.bfloat16)
        exact = torch.zeros(len(experts), len(layout.places), dtype=torch.float64)
        column = {name: index for index, name in enumerate(layout.names)}
        whole = [place.count for place in layout.places]
        for row, expert in enumerate(experts):
            samples, counts = expert.samples(), expert.counts()
            own = [column[name] for name in expert.numels]
            exact[row, own] = torch.from_numpy(expert.norms) / max(expert.norm, math.ulp(0))
            if own == list(range(len(whole))) and counts == whole:
                self.values[row] = samples
                continue
            for name, index, piece in zip(expert.numels, own, torch.split(samples, counts), strict=True):
                place = layout.places[index]
                self.values[row, place.start : place.stop] = _first(piece, name, place)
        self.weights = exact.float()
        self.scales, self.fourth = torch.zeros(2, len(experts), len(layout.places))
        self._full = []
        for index, place in enumerate(layout.places):
            x = self.values[:, place.start : place.stop].float()
            norms = torch.linalg.vector_norm(x, dim=1)
            self.scales[:, index] = torch.where(norms > 0, 1 / norms, 0.0)
            self._full.append(bool(x.all()))
            self.fourth[:, index] = x.mul_(self.scales[:, index, None]).square_().square_().sum(1)

    def __len__(self) -> int:
        return len(self.values)

    def is_full(self, index: int) -> bool:
        """Whether no expert has a zero among its samples of a parameter."""
        return self._full[index]

    def columns(self, index: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Some coordinates of a parameter, fp32: as parts of unit vectors, and their signs."""
        x = self.values[:, start:stop].float()
        return x * self.scales[:, index, None], x.sign()


def _first(sample: Tensor, name: str, place: Place) -> Tensor:
    """The coordinates that smaller samples hold as well."""
    if len(sample) == place.count:
        return sample
    # A larger sample begins with the smaller one, unless it holds every coordinate, in order.
    if len(sample) == place.numel:
        return sample[coordinates(name, place.numel, place.count)]
    return sample[: place.count]
