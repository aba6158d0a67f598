"""What an expert does, by forward passes on data that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mergeready.errors import EvaluationError, MergeReadyError
from mergeready.merging.evaluation import run_evaluation
from mergeready.merging.in_place import MergedInPlace
from mergeready.training.bootstrap import difference
from mergeready.validation.check import Limits, NotCheckedError, Result, check, compared
from mergeready.validation.evaluation import OWN
from mergeready.validation.subject import Subject

LINE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Scales of the task vector at which the line from base to expert is looked at."""


@check(
    "E301",
    "behaviour",
    "error",
    "its folded weights compute what the expert computes",
    fix="Do not share it: what others will merge is not what was trained. Report the adapter's configuration.",
    cost="passes",
)
def folded_equals_unfolded(subject: Subject, limits: Limits) -> Result:
    """Largest difference of logits on neutral inputs, relative to their spread."""
    evaluation = subject.evaluation
    if evaluation.outputs is None or evaluation.unfolded is None:
        raise NotCheckedError("no `outputs` and `unfolded` to compare")
    try:
        unfolded = evaluation.unfolded()
    except Exception as raised:
        raise EvaluationError(f"`unfolded` raised {type(raised).__name__}: {raised}") from raised
    expected = _outputs(subject, unfolded)
    with expert_in_place(subject) as merged:
        found = _outputs(subject, merged.live.model)
    if found.shape != expected.shape:
        raise EvaluationError(
            f"`outputs` has shape {tuple(expected.shape)} of `unfolded`, and {tuple(found.shape)} of the model."
        )
    error = float((found - expected).abs().max()) / max(float(expected.std()), 1e-12)
    message = f"logits differ by at most {error:.1e} of their spread"
    return compared(
        error <= limits["relative_error"], message, value=error, threshold=limits["relative_error"]
    )


@check(
    "E302",
    "behaviour",
    "warning",
    "it is better than its base on its own task",
    fix="Train longer, or look for what went wrong: there is nothing to share that the base does not do.",
    cost="passes",
)
def better_than_base(subject: Subject, limits: Limits) -> Result:
    """The 95 % interval of expert − base excludes zero, where examples are known; else the values alone."""
    base, expert = subject.own_scores
    gain = difference(expert, base)
    sign = 1 if subject.greater_is_better else -1
    worst = min(sign * value for value in (gain.value, gain.low, gain.high) if value is not None)
    message = f"{subject.metric} {base.value:.4g} → {expert.value:.4g}"
    if gain.low is not None and gain.high is not None:
        message += f", gain {gain.value:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}] on {gain.n} examples"
    return compared(worst > 0, message, value=gain.value, threshold=0)


@check(
    "E303",
    "behaviour",
    "info",
    "it answers as its base does on neutral inputs",
    fix="Nothing needs to be done if that is intended; merged models inherit part of it.",
    cost="passes",
)
def forgets_little(subject: Subject, limits: Limits) -> Result:
    """Mean KL(base ‖ expert) of the outputs on neutral inputs, in nats."""
    if subject.evaluation.outputs is None:
        raise NotCheckedError("no `outputs` on neutral inputs")
    with MergedInPlace(subject.evaluation.model, subject.base, [], include_model=False) as merged:
        before = _outputs(subject, merged.live.model).log_softmax(-1)
    with expert_in_place(subject) as merged:
        after = _outputs(subject, merged.live.model).log_softmax(-1)
    # What the base rules out, with a logit of minus infinity, adds nothing.
    terms = torch.where(before > -math.inf, before.exp() * (before - after), 0.0)
    divergence = float(terms.sum(-1).mean())
    message = f"KL(base ‖ expert) is {divergence:.3g} nats on average"
    return compared(
        divergence <= limits["divergence"], message, value=divergence, threshold=limits["divergence"]
    )


@check(
    "E304",
    "behaviour",
    "info",
    "its task improves steadily on the way from base to expert",
    fix="Merges scale task vectors down: an expert that is good only at full scale will merge badly. Train shorter.",
    cost="passes",
)
def improves_steadily(subject: Subject, limits: Limits) -> Result:
    """The metric at 0 to 1.25 times τ; the largest fall below the straight line, as a share of the whole gain."""
    evaluation, metric = subject.evaluation, subject.metric
    values = {}
    with expert_in_place(subject) as merged:
        for scale in LINE:
            merged.set_scale(scale)
            values[scale] = run_evaluation(evaluation.own, merged.live.model, metric, OWN).value
    gain = subject.gain(values[0.0], values[1.0])
    shown = ", ".join(f"{scale:g}: {value:.4g}" for scale, value in values.items())
    fall = max((values[0.0] + scale * gain - value) / gain for scale, value in values.items() if scale <= 1)
    return compared(
        fall <= limits["fall"], f"{metric} at scale {shown}", value=fall, threshold=limits["fall"]
    )


@contextmanager
def expert_in_place(subject: Subject) -> Iterator[MergedInPlace]:
    """The evaluation's model with the expert's weights."""
    try:
        expert = subject.expert
    except MergeReadyError as error:
        raise NotCheckedError("the expert does not fit its base") from error
    with MergedInPlace(subject.evaluation.model, subject.base, [expert], include_model=False) as merged:
        yield merged


def _outputs(subject: Subject, model: nn.Module) -> Tensor:
    if subject.evaluation.outputs is None:
        raise NotCheckedError("no `outputs` on neutral inputs")
    try:
        with torch.no_grad():
            return subject.evaluation.outputs(model.eval()).double().cpu()
    except Exception as error:
        raise EvaluationError(f"`outputs` raised {type(error).__name__}: {error}") from error
