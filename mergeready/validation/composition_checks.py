"""What merging an expert with others does to it and to them."""

from __future__ import annotations

from collections.abc import Sequence

from mergeready.errors import listing
from mergeready.experts.fingerprint import Fingerprint, is_fingerprint
from mergeready.experts.open import open_expert
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.evaluation import run_evaluation
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.tune import FIRST_SCALES, MAX_EVALUATIONS, TunedScale, tune_scale
from mergeready.training.surrogates import Surrogates, synthetic_peers
from mergeready.validation.check import Limits, NotCheckedError, Result, check, compared
from mergeready.validation.evaluation import OWN
from mergeready.validation.subject import Subject

METHODS = ("task_arithmetic", "ties")
"""Merge methods by which composition is judged."""


@check(
    "C401",
    "composition",
    "info",
    "its signs and direction do not oppose those of its peers",
    fix="Nothing needs to be done: cosines and signs predict merged quality badly. Merge and evaluate to know.",
    cost="values",
)
def interference(subject: Subject, limits: Limits) -> Result:
    """Cosine and sign conflict with each peer, from fingerprints; a diagnostic."""
    found = subject.pairs
    pairs = zip(found.labels[1:], found.cosine[0][1:], found.sign_conflict[0][1:], strict=True)
    rows = [(label, cosine, conflict) for label, cosine, conflict in pairs]
    shown = listing([f"{label}: cosine {c:.2f}, sign conflict {s:.2f}" for label, c, s in rows])
    opposed = [label for label, cosine, _ in rows if not cosine >= limits["cosine"]]
    worst = min(cosine for _, cosine, _ in rows)
    return compared(not opposed, shown, where=tuple(opposed), value=worst, threshold=limits["cosine"])


@check(
    "C402",
    "composition",
    "error",
    "merged with its peers, it keeps what it gained",
    fix="Merge an earlier checkpoint, try another merge method, or train with a probe that watches the merged metric.",
    cost="passes",
)
def retention(subject: Subject, limits: Limits) -> Result:
    """Retention of the own task, (merged − base) / (expert − base), by the better of two merge methods.

    Each method's scale is tuned on the evaluation itself. Without peers that can be merged, synthetic ones stand in,
    and the result says so.
    """
    base, expert = subject.own_scores
    gain = subject.gain(base.value, expert.value)
    others, kind = _others(subject)
    found = {method: _tuned(subject, others, method) for method in METHODS}
    kept = {method: (tuned.tasks[OWN] - base.value) / gain for method, tuned in found.items()}
    shown = listing(
        [f"{method} keeps {kept[method]:.0%} {_at_scale(tuned)}" for method, tuned in found.items()]
    )
    best = max(kept.values())
    message = f"merged with {len(others)} {kind}: {shown}"
    return compared(best >= limits["retention"], message, value=best, threshold=limits["retention"])


@check(
    "C403",
    "composition",
    "info",
    "its merge is good over a wide range of scales",
    fix="Tell others which scale to use: at the usual ones this merge loses much.",
    cost="passes",
)
def scale_range(subject: Subject, limits: Limits) -> Result:
    """Ratio of the largest to the smallest scale that keeps 90 % of the best merged gain, by task arithmetic."""
    others, kind = _others(subject)
    tuned = _tuned(subject, others, METHODS[0])
    base = tuned.tried[0.0]
    gain = tuned.value - base
    if not gain:
        raise NotCheckedError("no scale was better than the base")
    good = [scale for scale, value in tuned.tried.items() if scale and (value - base) / gain >= 0.9]
    ratio = max(good) / min(good)
    message = f"with {len(others)} {kind}, scales {min(good):.2g} to {max(good):.2g} keep 90 % of the gain"
    return compared(ratio >= limits["ratio"], message, value=ratio, threshold=limits["ratio"])


@check(
    "C404",
    "composition",
    "info",
    "a bad expert in the merge does not ruin it",
    fix="Merge with a method that elects signs or trims, and know your peers.",
    cost="passes",
)
def bad_expert(subject: Subject, limits: Limits) -> Result:
    """Retention of the own task by TIES when one more expert is noise of the same norm, at the scale that was best."""
    base, expert = subject.own_scores
    gain = subject.gain(base.value, expert.value)
    others, kind = _others(subject)
    method = METHODS[1]
    tuned = _tuned(subject, others, method)
    noise = synthetic_peers(subject.expert.vector, Surrogates(count=1, seed=1))
    evaluation, metric = subject.evaluation, subject.metric
    with MergedInPlace(
        evaluation.model,
        subject.base,
        [subject.expert, *others, *noise],
        method,
        scale=tuned.scale,
        include_model=False,
    ) as merged:
        score = run_evaluation(evaluation.own, merged.live.model, metric, OWN)
    kept = (score.value - base.value) / gain
    message = f"with {len(others)} {kind} and one of noise, {method} keeps {kept:.0%}"
    return compared(kept >= limits["retention"], message, value=kept, threshold=limits["retention"])


def _at_scale(tuned: TunedScale) -> str:
    return f"at scale {tuned.scale:.2g}{'' if tuned.inside else ', an edge of the search'}"


def _tuned(subject: Subject, others: Sequence[TaskVector], method: str) -> TunedScale:
    memory = subject.tuned
    if method not in memory:
        evaluation = subject.evaluation
        memory[method] = tune_scale(
            evaluation.model,
            subject.base,
            [subject.expert, *others],
            evaluation.tasks,
            method,
            metric=subject.metric,
            greater_is_better=subject.greater_is_better,
            scales=FIRST_SCALES,
            max_evaluations=MAX_EVALUATIONS,
        )
    return memory[method]


def _others(subject: Subject) -> tuple[list[TaskVector], str]:
    """The peers that have weights; without any, synthetic ones of the expert's own norm."""
    opened = [
        open_expert(peer, subject.base, strict=False).vector
        for peer in subject.given_peers
        if not (isinstance(peer, Fingerprint) or is_fingerprint(peer))
    ]
    if opened:
        return opened, "peers"
    return synthetic_peers(subject.expert.vector, Surrogates()), "surrogates"
