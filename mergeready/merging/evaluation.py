from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mergeready.errors import EvaluationError, listing

Values: TypeAlias = float | Tensor | Sequence[float] | NDArray[np.floating]
Evaluate: TypeAlias = Callable[[nn.Module], Mapping[str, Values]]
"""Evaluates a model: metric names to one number each, or to one number an example.

Called in evaluation mode without gradients. Numbers by example (1.0 or 0.0 for right or wrong, a loss, …) give
the metric as their mean, and confidence intervals with it.
"""

_LESS_IS_BETTER = re.compile(
    r"loss|perplexity|error|entropy|bits_per|negative_log|neg_log_lik"
    r"|(?<![a-z])(?:[cetw]er|r?mse|mae|mape|nll|ppl|bp[bc]|brier|ece|fid)(?![a-z])"
)
_NEGATED = re.compile(r"(?<![a-z])neg_(?!log_lik)")  # scikit-learn's scores, such as neg_log_loss


@dataclass(frozen=True, eq=False)
class Score:
    """A metric on one task: its value, and the value of each example where the evaluation gave them."""

    value: float
    examples: NDArray[np.float64] | None = None

    @property
    def n(self) -> int | None:
        """Number of examples, if known."""
        return None if self.examples is None else len(self.examples)


def run_evaluation(
    evaluate: Evaluate, model: nn.Module, metric: str, task: str, *, finite: bool = True
) -> Score:
    """Evaluate a model and take one metric from the result.

    Args:
        evaluate: The evaluation function.
        model: The model; it is put into evaluation mode (the caller puts it back).
        metric: Which of the returned metrics.
        task: What messages call the task.
        finite: Whether a value that is not finite is a failure, and not the model's own.

    Raises:
        EvaluationError: If the function raises, does not return the metric, or returns NaN or nothing.
    """
    return take_score(call_evaluation(evaluate, model, task), metric, task, finite=finite)


def call_evaluation(evaluate: Evaluate, model: nn.Module, task: str) -> Mapping[str, Values]:
    """Evaluate a model in evaluation mode without gradients, and check the form of the result.

    Raises:
        EvaluationError: If the function raises, or returns anything but metrics by name.
    """
    model.eval()
    try:
        with torch.no_grad():
            result = evaluate(model)
    except Exception as error:
        raise EvaluationError(f"the evaluation of {task} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping) or not result:
        raise EvaluationError(
            f"the evaluation of {task} must return metrics by name, not {type(result).__name__}."
        )
    return result


def choose_metric(result: Mapping[str, object], metric: str | None, task: str) -> str:
    """The metric to use: the one that was named, or the only one there is.

    Raises:
        EvaluationError: If it was not returned, or several were and none was named.
    """
    if metric is None and len(result) == 1:
        return next(iter(result))
    if metric is None:
        raise EvaluationError(
            f"the evaluation of {task} returns {listing(result)}: say which one with `metric`."
        )
    if metric not in result:
        raise EvaluationError(f"the evaluation of {task} returned no {metric!r}, only {listing(result)}.")
    return metric


def take_score(result: Mapping[str, Values], metric: str, task: str, *, finite: bool = True) -> Score:
    """One metric of an evaluation's result.

    Raises:
        EvaluationError: If it is not there, no number, not a finite one unless told so, or was taken over no examples.
    """
    raw = result[choose_metric(result, metric, task)]
    try:
        # A copy, since an evaluation may return the same buffer each time.
        plain = raw.detach().cpu().double().numpy() if isinstance(raw, Tensor) else raw
        values = np.array(plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"the evaluation of {task} returned {raw!r} as {metric}: no number.") from error
    if values.size == 0:
        raise EvaluationError(f"the evaluation of {task} saw no examples: its data is empty.")
    mean = float(values.mean())
    if finite and not math.isfinite(mean):
        raise EvaluationError(f"the evaluation of {task} returned {mean} as {metric}.")
    return Score(mean, None if values.ndim == 0 else values.reshape(-1))


def is_greater_better(metric: str, given: bool | None = None) -> bool:
    """Direction of a metric: as given, or by its name.

    >>> is_greater_better("accuracy"), is_greater_better("eval_loss"), is_greater_better("loss", True)
    (True, False, True)
    >>> is_greater_better("wer"), is_greater_better("neg_mean_squared_error")
    (False, True)
    """
    if given is not None:
        return given
    name = metric.lower()
    return _NEGATED.search(name) is not None or _LESS_IS_BETTER.search(name) is None
