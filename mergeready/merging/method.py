from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.experts.delta import Delta
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.selection import can_be_held
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo


@dataclass(frozen=True, slots=True)
class Place:
    """Which elements of which parameter a chunk holds: ``start`` to ``stop`` in row-major order.

    ``joint`` is what :meth:`ElementwiseMethod.prepare_jointly` found about the whole parameter; ``memories`` are the
    task vectors' own, for matrix methods to keep what they found out about each.
    """

    name: str
    start: int
    stop: int
    joint: Any = None
    memories: Sequence[dict[tuple[Any, ...], Any] | None] = ()


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):
    """A merge method with its parameters: from the deltas of one parameter to one merged delta.

    Subclasses are frozen dataclasses whose fields are the method's parameters; ``__post_init__`` checks their
    ranges. Arithmetic is fp32; engines apply ``scale`` and add the base.

    Attributes:
        name: The method's name in the registry.
        passes: How often each expert's delta is read; for plans.
    """

    name: ClassVar[str]
    passes: ClassVar[int] = 1

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        """Most memory in bytes that merging a parameter takes: an upper estimate, for plans and bounds.

        By itself all deltas whole, as much again for a decomposition of each and for joining them, and the result.

        Args:
            info: The parameter.
            experts: Number of experts.
        """
        return info.numel * 4 * (3 * experts + 6)

    def describe(self) -> dict[str, Any]:
        """The method and its parameters, JSON-ready."""
        return {"method": self.name, **vars(self)}

    def check(self, vectors: Sequence[TaskVector], names: Sequence[str], weights: Sequence[float]) -> None:
        """Raise if these experts cannot be merged this way; engines ask before anything is computed or written.

        Args:
            vectors: The experts' task vectors.
            names: The parameters that this method is used for, each in at least one of the task vectors.
            weights: One factor an expert.

        Raises:
            MergeReadyError: What is wrong, all of it at once.
        """
        return


@dataclass(frozen=True, kw_only=True)
class ElementwiseMethod(MergeMethod):
    """A method whose result at an element depends on the deltas at that element, and on one statistic each.

    Such methods run on pieces of any size, out of core and on shards, with identical results.
    """

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        # Deltas of this piece and of the one before, base, sums, result; and as much again that the allocator keeps.
        held = 4 * experts * info.numel if self.holds(info, experts) else 0
        return held + min(info.numel, CHUNK_ELEMENTS) * 4 * (4 * experts + 18)

    def holds(self, info: TensorInfo, experts: int) -> bool:
        """Whether the deltas of a parameter are read once and held, where they would be read several times."""
        return self.passes > 1 and can_be_held(info, experts)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> Any:
        """What ``combine`` needs to know about one expert's whole delta, such as a threshold.

        Args:
            vector: The expert's task vector.
            name: The parameter.
            slot: The expert's position among the experts.
        """
        return None

    def prepare_jointly(
        self,
        read: Callable[[int, int], list[Tensor]],
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
    ) -> Any:
        """What ``combine`` needs to know about all experts' whole deltas together, such as their angles.

        Args:
            read: Gives elements ``start`` to ``stop`` of every expert's delta, fp32, zeros where it has none; they
                must not be overwritten.
            info: The parameter's shape; cover it with ``chunk_ranges(info)``.
            weights: One factor an expert.
            prepared: What ``prepare`` returned for each expert.
        """
        return None

    @abstractmethod
    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        """Merge one chunk.

        Args:
            deltas: One fp32 1-D tensor an expert, all of one length; they may be overwritten.
            weights: One factor an expert.
            prepared: What ``prepare`` returned for each expert.
            place: Which elements these are.

        Returns:
            The merged delta of the chunk, fp32, same length.
        """


@dataclass(frozen=True, kw_only=True)
class MatrixMethod(MergeMethod):
    """A method that looks at a parameter as a whole matrix, such as one that works on singular vectors.

    A parameter is seen as ``(rows, columns)``: its first dimension by all others together. Parameters of fewer than
    two dimensions go to ``rest``.

    Attributes:
        rest: Name of the elementwise method, with its defaults, for parameters that are no matrices.
    """

    rest: str = "task_arithmetic"

    def for_vectors(self) -> str | MergeMethod:
        """The method for parameters that are no matrices."""
        return self.rest

    def handles(self, name: str, info: TensorInfo) -> bool:
        """Whether a parameter is merged by this method, rather than by ``rest``."""
        return len(info.shape) > 1

    @abstractmethod
    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        """Merge one parameter.

        Args:
            deltas: One delta an expert in its most compact exact form, None where it has none; at least one is there.
            weights: One factor an expert.
            place: The whole parameter.

        Returns:
            The merged delta, fp32, of shape (rows, columns) or the parameter's own.
        """


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ τᵢ, in place on the first delta.

    Multiplied and added in separate steps: a fused multiply-add rounds differently in the vectorised and in the
    scalar part of a loop, and results would depend on how a parameter was cut into pieces.
    """
    parts = weighted(deltas, weights)
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """wᵢ τᵢ for each expert, in place."""
    return [
        delta if weight == 1 else delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)
    ]


def zeros_if_finite(deltas: Sequence[Tensor]) -> Tensor:
    """Zeros of the shape of the deltas; NaN where one is NaN or infinite, for methods that would hide it from engines.

    >>> zeros_if_finite([torch.tensor([1.0, 2.0]), torch.tensor([float("inf"), 3.0])])
    tensor([nan, 0.])
    """
    zeros = torch.zeros_like(deltas[0])
    for delta in deltas:
        if not math.isfinite(delta.sum()):
            zeros += delta * 0
    return zeros
