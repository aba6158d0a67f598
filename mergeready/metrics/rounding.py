from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mergeready.experts.stored import Rounded
from mergeready.experts.sums import squared_norm
from mergeready.metrics.stream import Accumulator, Chunk


class RoundingAccumulator(Accumulator):
    """How much of a task vector is the rounding of the format that its expert is stored in.

    A weight θ in a format with spacing ε at 1 is off by ``ulp(θ) = ε · 2^⌊log₂|θ|⌋`` times a number in [−½, ½], whose
    variance is 1/12 where it is spread evenly. So ``√(Σ ulp(θ)² / 12)`` is the norm that rounding alone gives τ, and
    the resolution is this norm over ‖τ‖: near 0 τ is known well, at 1 it may be rounding and nothing else. Of an
    adapter the factors are rounded, and their two errors are a share of the delta whatever its size: ``ulp(δ)²/12``
    twice.

    Args:
        rounded: How each parameter was rounded; those that are not named were not.
    """

    def __init__(self, rounded: Mapping[str, Rounded]) -> None:
        self._rounded = dict(rounded)
        # Expected squared error; squared norm of everything; entries of rounded weights, and those equal to the base.
        self.sums = torch.zeros(4, dtype=torch.float64)

    def needs_base(self, name: str) -> bool:
        """Whether a parameter's rounding depends on the base's values, which most of an adapter's does not."""
        rounded = self._rounded.get(name)
        return rounded is not None and rounded.of != "factors"

    def update(self, chunk: Chunk) -> None:
        delta = chunk.deltas[0]
        self.sums[1] += squared_norm(delta)
        rounded = self._rounded.get(chunk.name)
        if rounded is None:
            return
        if rounded.of == "factors":
            self.sums[0] += 2 * squared_norm(spacing(delta, rounded.dtype)) / 12
            return
        steps = spacing(chunk.base + delta, rounded.dtype)
        if rounded.of == "rows":
            steps *= delta != 0
        else:
            self.sums[2] += delta.numel()
            self.sums[3] += delta.numel() - int(torch.count_nonzero(delta))
        self.sums[0] += squared_norm(steps) / 12

    def resolution(self) -> float:
        """Expected norm of the rounding error over ‖τ‖; NaN where τ is zero."""
        error, norm, _, _ = self.sums.tolist()
        return math.sqrt(error / norm) if norm else math.nan

    def unchanged(self) -> float:
        """Share of entries of rounded weights that equal the base; NaN where no weights are rounded."""
        _, _, count, same = self.sums.tolist()
        return same / count if count else math.nan

    def _layout(self) -> dict[str, object]:
        return {}  # the sums mean the same whatever was rounded


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of a format at each value, fp32.

    >>> spacing(torch.tensor([1.0, -1.5, 2.0, 3.9]), torch.bfloat16)
    tensor([0.0078, 0.0078, 0.0156, 0.0156])
    """
    info = torch.finfo(dtype)
    # The exponent's bits alone are the power of two below.
    power = (values.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp(min=info.tiny).mul_(info.eps)
