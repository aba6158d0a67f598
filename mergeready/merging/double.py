"""Sums in float64, for whoever wants the rounding of sums out of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from torch import Tensor

from mergeready.errors import OptionError, listing
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import ElementwiseMethod, MergeMethod, Place
from mergeready.merging.settings import MergeSettings
from mergeready.weights.source import TensorInfo

Arithmetic: TypeAlias = Literal["float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class InDouble(ElementwiseMethod):
    """A method that sums in float64.

    Deltas themselves are fp32 differences: of fp32 or narrower weights that lie within a factor of two of each
    other, as fine-tuned weights do, these are exact (Sterbenz' lemma). Selection works on them and does not change.

    Attributes:
        inner: The method.
    """

    name: ClassVar[str] = "in_double"
    inner: ElementwiseMethod

    def holds(self, info: TensorInfo, experts: int) -> bool:
        return self.inner.holds(info, experts)

    def prepare(self, vector: TaskVector, name: str, slot: int) -> Any:
        return self.inner.prepare(vector, name, slot)

    def prepare_jointly(
        self,
        read: Callable[[int, int], list[Tensor]],
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
    ) -> Any:
        return self.inner.prepare_jointly(read, info, weights, prepared)

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        return self.inner.combine([delta.double() for delta in deltas], weights, prepared, place)


def in_arithmetic(arithmetic: Arithmetic, method: MergeMethod) -> MergeMethod:
    """The method with its sums in the wanted precision."""
    if arithmetic == "float64" and isinstance(method, ElementwiseMethod):
        return InDouble(inner=method)
    return method


def check_arithmetic(arithmetic: Arithmetic, settings: MergeSettings) -> Arithmetic:
    """A precision in which every method of a merge can work.

    Raises:
        OptionError: If it is unknown, or a method looks at whole matrices: decompositions are fp32.
    """
    if arithmetic not in get_args(Arithmetic):
        raise OptionError(f"`arithmetic` must be float32 or float64, not {arithmetic!r}.")
    whole = dict.fromkeys(m.name for m in settings.methods if not isinstance(m, ElementwiseMethod))
    if arithmetic == "float64" and whole:
        raise OptionError(f"{listing(whole)} decompose matrices in float32; `arithmetic` must stay float32.")
    return arithmetic
