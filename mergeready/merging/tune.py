"""The best scale of a merge, found by evaluating it: one search for probes during training and merges afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike
from mergeready.merging.evaluation import (
    Evaluate,
    Score,
    call_evaluation,
    choose_metric,
    is_greater_better,
    run_evaluation,
    take_score,
)
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.registry import MethodLike
from mergeready.merging.scale_search import ScaleSearch, search_scale
from mergeready.weights.open import WeightsLike

FIRST_SCALES = (0.3, 0.5, 0.8)
MAX_EVALUATIONS = 8


@dataclass(frozen=True)
class TunedScale:
    """The best scale of a merge, and what it was chosen from.

    Attributes:
        scale: The best scale; 0 where no merge was better than the base.
        value: Mean metric over tasks there.
        inside: Whether the optimum lies inside the scales that were tried. Where not, ``value`` is a bound.
        tried: Scale to mean metric, by rising scale; the base counts as scale 0.
        metric: The metric's name.
        tasks: The metric by task at the best scale.
    """

    scale: float
    value: float
    inside: bool
    tried: Mapping[float, float]
    metric: str
    tasks: Mapping[str, float]


def tune_scale(
    model: nn.Module,
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    evaluate: Evaluate | Mapping[str, Evaluate],
    method: MethodLike = "task_arithmetic",
    *,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    scales: Sequence[float] = FIRST_SCALES,
    max_evaluations: int = MAX_EVALUATIONS,
    weights: Sequence[float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> TunedScale:
    """Find the scale at which a merge is best on average over tasks.

    The grid widens by its own ratio until the optimum lies inside it; use validation data, as choosing is a use.

    Args:
        model: A model of the base's architecture to evaluate in; afterwards it is as it was, bit for bit.
        base: The base.
        experts: The experts.
        evaluate: One evaluation, or one a task.
        method: A merge method's name, or a method with its parameters.
        metric: Which of the returned metrics; may be left out where there is only one.
        greater_is_better: Direction of the metric; by its name where it is left out.
        scales: The first grid.
        max_evaluations: Most scales to try.
        weights: One factor an expert; 1 each by default.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        **parameters: The method's parameters.

    Raises:
        MergeReadyError: As ``MergedInPlace`` and the evaluations do.

    Example:
        >>> import torch
        >>> base, model = {"weight": torch.zeros(1, 1)}, torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.load_state_dict(base)
        >>> near_two = lambda model: {"closeness": -abs(model.weight.item() - 2.0)}
        >>> tuned = tune_scale(model, base, [{"weight": torch.ones(1, 1)}], near_two, scales=(0.5, 1.0))
        >>> tuned.scale, tuned.inside
        (2.0, True)
    """
    tasks = dict(evaluate) if isinstance(evaluate, Mapping) else {"task": evaluate}
    if not tasks:
        raise OptionError("`evaluate` names no task.")
    with MergedInPlace(
        model,
        base,
        experts,
        method,
        weights=weights,
        overrides=overrides,
        include_model=False,
        scale=0.0,
        **parameters,
    ) as merged:
        results = {
            task: call_evaluation(function, merged.live.model, task) for task, function in tasks.items()
        }
        name = choose_metric(next(iter(results.values())), metric, next(iter(tasks)))
        at_base = {task: take_score(result, name, task) for task, result in results.items()}
        search, scores = search_merged(
            merged,
            tasks,
            name,
            scales,
            at_base=at_base,
            greater_is_better=is_greater_better(name, greater_is_better),
            max_evaluations=max_evaluations,
        )
    found = {task: score.value for task, score in scores.items()}
    return TunedScale(search.best, search.value, search.inside, search.tried, name, found)


def search_merged(
    merged: MergedInPlace,
    tasks: Mapping[str, Evaluate],
    metric: str,
    scales: Sequence[float],
    *,
    at_base: Mapping[str, Score],
    greater_is_better: bool,
    max_evaluations: int,
) -> tuple[ScaleSearch, Mapping[str, Score]]:
    """Search the best scale of a merge that is in place, by the mean of a metric over tasks.

    A scale at which it is not finite, as where half precision overflows, is worse than any other.

    Args:
        merged: The merge, inside its ``with`` block; it is left at the scale that was tried last.
        tasks: The evaluations.
        metric: The metric's name.
        scales: The first grid.
        at_base: The base's score on each task, which is the merge at scale 0.
        greater_is_better: Direction of the metric.
        max_evaluations: Most scales to try.

    Returns:
        The search, without the scales at which the mean was not finite, and each task's score at the best scale.

    Raises:
        EvaluationError: If an evaluation fails.
    """
    scores: dict[float, Mapping[str, Score]] = {0.0: {task: at_base[task] for task in tasks}}

    def mean_at(scale: float) -> float:
        merged.set_scale(scale)
        found = {
            task: run_evaluation(evaluate, merged.live.model, metric, task, finite=False)
            for task, evaluate in tasks.items()
        }
        mean = _mean(found)
        if not math.isfinite(mean):
            return math.nan
        scores[scale] = found
        return mean

    search = search_scale(
        mean_at,
        scales,
        greater_is_better=greater_is_better,
        base_value=_mean(scores[0.0]),
        max_evaluations=max_evaluations,
    )
    tried = {scale: value for scale, value in search.tried.items() if scale in scores}
    return replace(search, tried=tried), scores[search.best]


def _mean(scores: Mapping[str, Score]) -> float:
    return sum(score.value for score in scores.values()) / len(scores)
