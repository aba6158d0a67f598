"""What is lost where merged values are rounded to the dtype of the output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mergeready.merging.journal import Finished

_WORST = 5
_ONE_IN = 17  # odd, so that all rows and all columns are met
_ALL = 2**14  # elements of a piece that are all looked at


def rounding_sums(base: Tensor, delta: Tensor, scale: float, merged: Tensor) -> tuple[float, float]:
    """‖c‖² and ‖(m − b) − c‖² of one piece, for base b, change c = scale · delta and the rounded result m.

    Of long pieces every 17th value stands for the others: looking at all would take a good part of what a simple merge
    does.
    """
    looked_at = slice(None, None, _ONE_IN if len(delta) > _ALL else 1)
    change = delta[looked_at] * scale
    error = merged[looked_at].to(change).sub(base[looked_at].to(change)).sub_(change)
    factor = len(delta) / len(change)
    return factor * float(torch.dot(change, change)), factor * float(torch.dot(error, error))


@dataclass(frozen=True)
class RoundingLoss:
    """How much of the merged change rounding loses, relative to it: ‖error‖ / ‖change‖.

    Base weights are much larger than what fine-tuning does to them, so a result of few digits keeps few of the change:
    bfloat16 has 8 bits, and a change of 1 % of a weight keeps one or two of them. Estimated where parameters are large;
    see :func:`rounding_sums`.

    Attributes:
        dtype: What was rounded to.
        total: Of all parameters together.
        worst: Of the parameters that lose most, most first.
    """

    dtype: str
    total: float
    worst: dict[str, float]

    @classmethod
    def of(cls, finished: Iterable[Finished], dtypes: Iterable[torch.dtype]) -> RoundingLoss:
        """Sum up what each parameter lost, by what is known of each and the dtypes of all.

        >>> finished = [Finished("a", change=4.0, error=1.0), Finished("b", change=12.0, error=0.0)]
        >>> RoundingLoss.of(finished, [torch.bfloat16])
        RoundingLoss(dtype='bfloat16', total=0.25, worst={'a': 0.5})
        """
        changed = [entry for entry in finished if entry.change > 0]
        shares = {entry.name: _digits(math.sqrt(entry.error / entry.change)) for entry in changed}
        worst = sorted((name for name in shares if shares[name] > 0), key=lambda name: (-shares[name], name))
        whole = math.fsum(entry.change for entry in changed)
        lost = math.fsum(entry.error for entry in changed)
        total = _digits(math.sqrt(lost / whole)) if whole else 0.0
        names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        return cls(names, total, {name: shares[name] for name in worst[:_WORST]})

    def describe(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return asdict(self)


def _digits(value: float) -> float:
    """Four significant digits: more would only tell how the sum was rounded."""
    return float(f"{value:.4g}")
