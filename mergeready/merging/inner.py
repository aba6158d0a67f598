"""Methods that wrap another one: they change what it sees or what it gives."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import Delta, Dense
from mergeready.experts.frame import all_finite
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.task_vector import DeltaTaskVector, TaskVector
from mergeready.merging.information import Information
from mergeready.merging.method import MatrixMethod, MergeMethod, Place
from mergeready.merging.parameter import merged_delta
from mergeready.merging.registry import MethodLike, make_method, require_elementwise
from mergeready.merging.spectral import SpectralMethod, nothing
from mergeready.weights.source import TensorInfo

InnerLike = MethodLike | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WrappingMethod(MatrixMethod):
    """A matrix method around another merge method.

    Attributes:
        inner: The other method: its name, a method with its parameters, or, as in files, a mapping (also as JSON text)
            of ``method`` and parameters, such as ``{"method": "ties", "density": 0.1}``.
        rest: Name of the elementwise method for parameters that are no matrices; ``inner`` for what the inner method
            does with them.
    """

    inner: InnerLike = "task_arithmetic"
    rest: str = "inner"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", _resolved(self.inner))
        if self.rest != "inner":
            require_elementwise("rest", self.rest)

    @property
    def method(self) -> MergeMethod:
        """The inner method itself."""
        return _resolved(self.inner)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"inner": self.method.describe()}

    def for_vectors(self) -> str | MergeMethod:
        if self.rest != "inner":
            return self.rest
        return self.method.for_vectors() if isinstance(self.method, MatrixMethod) else self.method

    def check(self, vectors: Sequence[TaskVector], names: Sequence[str], weights: Sequence[float]) -> None:
        if self.rest == "inner":
            self.method.check(vectors, names, weights)
            return
        infos = {name: vector.infos[name] for vector in vectors for name in vector}
        handled = [name for name in names if self.handles(name, infos[name])]
        self.method.check(vectors, handled, weights)
        make_method(self.rest).check(vectors, [name for name in names if name not in handled], weights)

    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        if not all_finite(deltas):
            return nothing(deltas, fill=float("nan"))
        return self.merge_finite(deltas, weights, place).float()

    @abstractmethod
    def merge_finite(self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place) -> Tensor:
        """``combine_matrices`` for deltas without NaN and infinite values."""

    def merge_inside(self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place) -> Tensor:
        """What the inner method makes of deltas of one shape, as exactly as it can."""
        shape = next(delta.shape for delta in deltas if delta is not None)
        if isinstance(self.method, SpectralMethod) and len(shape) > 1:
            return self.method.merge_exactly(deltas, weights)
        info = TensorInfo(shape, torch.float32)
        vectors: list[TaskVector] = [
            DeltaTaskVector(
                {} if d is None else {place.name: d}, {place.name: info}, BaseIdentity({}), "inside"
            )
            for d in deltas
        ]
        merged = merged_delta(self.method, place.name, info, vectors, weights)
        return nothing(deltas) if merged is None else merged


def require_no_data(name: str, method: MergeMethod) -> None:
    """Check that an inner method works in any coordinates: what was measured about parameters belongs to their own.

    Raises:
        OptionError: If it needs such data.
    """
    found = with_data(method)
    if found is not None:
        raise OptionError(f"{name} merges in other coordinates than those that {found} has data about.")


def with_data(method: MergeMethod) -> str | None:
    """The name of the method, this one or one inside of it, that has data about each expert; None without any."""
    inside = with_data(method.method) if isinstance(method, WrappingMethod) else None
    has_data = any(isinstance(value, Information) for value in vars(method).values())
    return inside or (method.name if has_data else None)


def as_deltas(matrices: Mapping[int, Tensor], count: int) -> list[Delta | None]:
    """Matrices of some experts among ``count``, as the deltas that a method takes."""
    return [Dense(matrices[slot]) if slot in matrices else None for slot in range(count)]


def _resolved(inner: InnerLike) -> MergeMethod:
    if isinstance(inner, str) and inner.startswith("{"):
        try:
            inner = json.loads(inner)
        except json.JSONDecodeError as error:
            raise OptionError(f"`inner` is neither a method's name nor JSON ({error}): {inner}.") from error
    if isinstance(inner, str | MergeMethod):
        return make_method(inner)
    if not isinstance(inner, Mapping) or "method" not in inner:
        raise OptionError(f"`inner` must be a method, or a mapping with `method`, not {inner!r}.")
    return make_method(inner["method"], **{key: value for key, value in inner.items() if key != "method"})
