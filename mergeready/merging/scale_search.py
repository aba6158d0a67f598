from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mergeready.errors import OptionError

_SINGLE_RATIO = 1.6


@dataclass(frozen=True)
class ScaleSearch:
    """What a search for the best scale found.

    Attributes:
        best: The scale with the best value.
        value: Its value.
        tried: Every scale that was evaluated, with its value, by rising scale.
        inside: Whether the best scales are enclosed, by worse ones above and by worse ones or the base below. Where
            not, the optimum may lie beyond what was tried, and the value is a bound rather than a result.
    """

    best: float
    value: float
    tried: Mapping[float, float]
    inside: bool


def search_scale(
    evaluate: Callable[[float], float],
    scales: Sequence[float],
    *,
    greater_is_better: bool = True,
    base_value: float | None = None,
    max_evaluations: int = 8,
) -> ScaleSearch:
    """Find the best scale, widening the grid by its own ratio until the optimum lies inside.

    A grid that ends too early reverses conclusions, because short task vectors want large scales. For the same reason
    a plateau is followed to its end. Among equal values the middle scale is taken; values that are not finite, as where
    a model overflows, are the worst.

    Args:
        evaluate: The metric of the model merged at a scale.
        scales: The first grid: positive, at least one.
        greater_is_better: Direction of the metric.
        base_value: The metric of the base, which is the merge at scale 0: it bounds the grid from below for free.
        max_evaluations: Calls of ``evaluate`` at the most; the first grid is always tried whole.

    Raises:
        OptionError: If the grid is empty, or a scale is not positive and finite.

    Example:
        >>> found = search_scale(lambda scale: -(scale - 2.0) ** 2, [0.5, 1.0])
        >>> found.best, found.inside, list(found.tried)
        (2.0, True, [0.5, 1.0, 2.0, 4.0])
    """
    grid = check_scales(scales)
    sign = 1.0 if greater_is_better else -1.0
    values = {scale: evaluate(scale) for scale in grid}
    calls = len(values)
    if base_value is not None:
        values[0.0] = base_value
    while True:
        ties = _best(values, sign)
        edge = _open_edge(values, ties)
        if edge is None or calls >= max_evaluations:
            best = _middle(ties)
            return ScaleSearch(best, values[best], dict(sorted(values.items())), edge is None)
        values[edge] = evaluate(edge)
        calls += 1


def check_scales(scales: Sequence[float]) -> list[float]:
    """Sorted, distinct, positive, finite scales.

    Raises:
        OptionError: If they are not.
    """
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise OptionError(f"`scales` must be positive numbers, at least one, not {tuple(scales)}.")
    return sorted({float(scale) for scale in scales})


def _best(values: Mapping[float, float], sign: float) -> list[float]:
    """The scales with the best value, rising; what is not finite is worse than any number."""
    known = {scale: sign * value for scale, value in values.items() if math.isfinite(value)}
    top = max(known.values(), default=math.nan)
    return sorted(scale for scale, value in known.items() if value == top) or sorted(values)


def _middle(ties: Sequence[float]) -> float:
    positive = [scale for scale in ties if scale > 0] or ties
    return positive[(len(positive) - 1) // 2]


def _open_edge(values: Mapping[float, float], ties: Sequence[float]) -> float | None:
    """The next scale to try where a best one is at the edge of what was tried; None where all lie inside."""
    positive = sorted(scale for scale in values if scale > 0)
    if ties[-1] == positive[-1]:
        ratio = positive[-1] / positive[-2] if len(positive) > 1 else _SINGLE_RATIO
        return positive[-1] * ratio
    if ties == [0.0] or (0.0 not in values and ties[0] == positive[0]):
        ratio = positive[1] / positive[0] if len(positive) > 1 else _SINGLE_RATIO
        return positive[0] / ratio
    return None
