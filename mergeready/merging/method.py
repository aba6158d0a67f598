from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergeready.experts.task_vector import TaskVector


@dataclass(frozen=True, slots=True)
class Place:
    """Which elements of which parameter a chunk holds: ``start`` to ``stop`` in row-major order."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):
    """A merge method with its parameters: from the deltas of one parameter to one merged delta.

    Subclasses are frozen dataclasses whose fields are the method's parameters; ``__post_init__`` checks their
    ranges. Arithmetic is fp32; engines apply ``scale`` and add the base.

    Attributes:
        name: The method's name in the registry.
    """

    name: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """The method and its parameters, JSON-ready."""
        return {"method": self.name, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class ElementwiseMethod(MergeMethod):
    """A method whose result at an element depends on the deltas at that element, and on one statistic each.

    Such methods run on pieces of any size, out of core and on shards, with identical results.
    """

    def prepare(self, vector: TaskVector, name: str, slot: int) -> Any:
        """What ``combine`` needs to know about one expert's whole delta, such as a threshold.

        Args:
            vector: The expert's task vector.
            name: The parameter.
            slot: The expert's position among the experts.
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


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ τᵢ, in place on the first delta.

    Multiplied and added in separate steps: a fused multiply-add rounds differently in the vectorised and in the
    scalar part of a loop, and results would depend on how a parameter was cut into pieces.
    """
    total = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta.mul_(weight))
    return total
