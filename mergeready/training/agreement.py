"""Evaluations of a run of several ranks: the same numbers on all, or an error on all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mergeready.errors import EvaluationError
from mergeready.merging.evaluation import Evaluate, Values
from mergeready.weights.ranks import Ranks

_TOLERANCE = 1e-3
_SHARE = 0.99


def agreed(evaluate: Evaluate, ranks: Ranks) -> Evaluate:
    """The evaluation as every rank has to see it: with the first rank's numbers, if the others found the same.

    It runs on every rank. Numbers may differ by rounding; where they differ by more, as where each rank evaluates
    examples of its own and nothing is gathered, the metric is an error when it is used. An exception on one rank is
    one on all, once the others have finished; those that wait for it inside a collective of the evaluation, such as a
    pass through an FSDP2 model, do so until the time-out of that collective's group.

    >>> agreed(lambda model: {"accuracy": 0.5}, Ranks.alone())(nn.Identity())
    {'accuracy': 0.5}
    """
    if ranks.size == 1:
        return evaluate

    def on_every_rank(model: nn.Module) -> Mapping[str, Values]:
        with ranks.together(), torch.no_grad():
            own = _plain(evaluate(model))
        first = ranks.same(own)
        found = ranks.each({name: _summary(name, value, own) for name, value in first.items()})
        result: dict[str, Values] = {}
        for name, value in first.items():
            alike = all(other[name][0] for other in found)
            means = [other[name][1] for other in found]
            result[name] = value if alike else _Disagreement(means)  # type: ignore[assignment]  # an error once used
        return result

    return on_every_rank


class _Disagreement:
    """Stands for a number on which ranks disagree; its name ends up in the message when someone wants the number."""

    def __init__(self, values: list[float | None]) -> None:
        self._values = values

    def __repr__(self) -> str:
        return (
            f"{self._values} on the ranks of this run (evaluate the same examples on every rank, or gather the values "
            "of all examples inside the evaluation)"
        )


def _plain(result: object) -> dict[str, float | NDArray[np.float64]]:
    """What can be compared and sent: metrics that are numbers."""
    if not isinstance(result, Mapping):
        raise EvaluationError(f"metrics by name are needed, not {type(result).__name__}")
    plain: dict[str, float | NDArray[np.float64]] = {}
    for name, value in result.items():
        try:
            array = np.array(
                value.detach().cpu().double() if isinstance(value, Tensor) else value, np.float64
            )
        except (TypeError, ValueError):
            continue  # a name, a note: no metric
        plain[name] = float(array) if array.ndim == 0 else array
    return plain


def _summary(
    name: str, value: float | NDArray[np.float64], own: Mapping[str, float | NDArray[np.float64]]
) -> tuple[bool, float | None]:
    """Whether this rank found the same, and the mean that it found."""
    mine = own.get(name)
    if mine is None:
        return False, None
    mean = float(np.mean(mine)) if np.size(mine) else None
    if np.shape(mine) != np.shape(value):
        return False, mean
    close = np.isclose(mine, value, rtol=_TOLERANCE, atol=1e-8, equal_nan=True)
    return bool(np.size(close) == 0 or np.mean(close) >= _SHARE), mean
