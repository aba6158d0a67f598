"""What a study measures at a cell: base and experts on their tasks, and merges with their scale tuned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.merging import MergedInPlace
from mergeready.merging.evaluation import (
    Evaluate,
    Score,
    call_evaluation,
    choose_metric,
    is_greater_better,
    take_score,
)
from mergeready.merging.tune import search_merged
from mergeready.study.settings import MergeChoice
from mergeready.study.suite import StudyTask


def evaluate_task(model: nn.Module, name: str, task: StudyTask, metric: str) -> dict[str, Any]:
    """A model on one task: mean on validation, and every example of test and further evaluations."""
    return {
        "validation": _score(model, task.validation, name, metric).value,
        "test": _values(_score(model, task.test, name, metric)),
        "extra": {
            key: _values(_score(model, evaluate, f"{name}, {key}", metric))
            for key, evaluate in task.extra.items()
        },
    }


def evaluate_experts(
    model: nn.Module,
    base: Mapping[str, Tensor],
    paths: Mapping[str, Path],
    tasks: Mapping[str, StudyTask],
    metric: str,
) -> dict[str, Any]:
    """Each expert on its own task."""
    found = {}
    for name, path in paths.items():
        with MergedInPlace(model, base, [path], include_model=False):
            found[name] = evaluate_task(model, name, tasks[name], metric)
    return found


def evaluate_merged(
    model: nn.Module,
    base: Mapping[str, Tensor],
    paths: Mapping[str, Path],
    tasks: Mapping[str, StudyTask],
    choice: MergeChoice,
    *,
    at_base: Mapping[str, float],
    scales: Sequence[float],
    max_evaluations: int,
    metric: str,
) -> dict[str, Any]:
    """Merge experts, tune the scale on validation examples, and evaluate there.

    Args:
        model: A model with the base's weights; it has them again afterwards.
        base: The base.
        paths: The experts' checkpoints by task.
        tasks: The tasks.
        choice: How to merge.
        at_base: The base's validation metric by task.
        scales: First grid of the search.
        max_evaluations: Most scales to try.
        metric: Name of the metric.
    """
    began = time.process_time()
    chosen = {name: tasks[name] for name in paths}
    with MergedInPlace(model, base, list(paths.values()), choice.make(), include_model=False) as merged:
        scale, inside, tried = 1.0, True, {}
        if choice.tune:
            search, _ = search_merged(
                merged,
                {key: task.validation for key, task in chosen.items()},
                metric,
                scales,
                at_base={key: Score(at_base[key]) for key in chosen},
                greater_is_better=is_greater_better(metric),
                max_evaluations=max_evaluations,
            )
            scale, inside, tried = search.best, search.inside, dict(search.tried)
            merged.set_scale(scale)
        results = {key: evaluate_task(model, key, task, metric) for key, task in chosen.items()}
    return {
        "scale": scale,
        "inside": inside,
        "tried": sorted(tried.items()),
        "first_scales": list(scales) if choice.tune else [],
        "tasks": results,
        "cpu_seconds": time.process_time() - began,
    }


def metric_of(model: nn.Module, tasks: Mapping[str, StudyTask], metric: str | None) -> str:
    """Name of the metric: as given, or the only one that the first task has.

    Raises:
        EvaluationError: If there are several, or the one that was named is not there.
    """
    name, task = next(iter(tasks.items()))
    return choose_metric(call_evaluation(task.validation, model, name), metric, name)


def _score(model: nn.Module, evaluate: Evaluate, name: str, metric: str) -> Score:
    return take_score(call_evaluation(evaluate, model, name), metric, name)


def _values(score: Score) -> list[float]:
    """Every example's value, or the mean where an evaluation gives no more; whole numbers without their point."""
    values = [score.value] if score.examples is None else score.examples.tolist()
    return [int(value) if float(value).is_integer() else value for value in values]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    with torch.no_grad():
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
