from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.angles import cosines
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register
from mergeready.weights.source import TensorInfo

_SMALL_ANGLE = 1e-3
"""Radians; the line and the arc of such an angle differ by less than fp32 resolves."""


@register
@dataclass(frozen=True, kw_only=True)
class Slerp(ElementwiseMethod):
    """Spherical interpolation of two task vectors: ``sin((1-t)Ω)/sin Ω · τ₁ + sin(tΩ)/sin Ω · τ₂``.

    ``t = w₂ / (w₁ + w₂)``, and Ω is the angle between the two deltas of a parameter. Where a mean of two equally long
    vectors is shorter than they are, this keeps their length. Shoemake, "Animating rotation with quaternion curves"
    (SIGGRAPH 1985), section 3.3. Deltas are interpolated, not weights (as ``nuslerp`` with a base model in mergekit;
    its ``slerp`` turns weights): the weights of two experts of one base are almost parallel, and on them
    slerp is just the average.

    Interpolation is linear where there is no angle, or none to speak of: a delta is zero, or the two point
    the same or exactly opposite ways. Weights that sum to zero give a zero delta, as in ``average``. The method is for
    exactly two experts; in a probe these are the run's own and one peer.
    """

    name: ClassVar[str] = "slerp"
    passes: ClassVar[int] = 2

    def check(self, vectors: Sequence[TaskVector], names: Sequence[str], weights: Sequence[float]) -> None:
        _require_two(len(vectors))

    def prepare_jointly(
        self,
        read: Callable[[int, int], list[Tensor]],
        info: TensorInfo,
        weights: Sequence[float],
        prepared: Sequence[Any],
    ) -> tuple[float, float]:
        _require_two(len(weights))  # once more, for methods that leave some parameters to this one
        first, second = weights
        if first + second == 0:
            return 0.0, 0.0
        t = second / (first + second)
        angle = float(torch.acos(cosines(read, info, 2)[0, 1]))  # NaN where there is none
        if _SMALL_ANGLE < angle < math.pi - _SMALL_ANGLE:
            return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        return 1 - t, t

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        return weighted_sum(deltas, place.joint)


def _require_two(count: int) -> None:
    if count != 2:
        raise OptionError(
            f"slerp is for exactly two experts, not {count}. Use average or model_stock for more, "
            "or merge two at a time."
        )
