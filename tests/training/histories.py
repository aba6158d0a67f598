"""Histories written by hand, and records of every kind drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from hypothesis import strategies as st

from mergeready.training.history import History
from mergeready.training.records import (
    DecisionRecord,
    Estimate,
    MergeResult,
    MetricsRecord,
    ProbeRecord,
    ResumeRecord,
    StartRecord,
    TaskResult,
)


def start(*methods: str, greater: bool = True, step: int = 0) -> StartRecord:
    return StartRecord(
        step=step,
        base="b" * 64,
        metric="accuracy",
        greater_is_better=greater,
        methods=[{"label": method, "method": method} for method in methods],
    )


def probe(step: int, expert: float, *, surrogate: bool = False, **merged: float) -> ProbeRecord:
    """A probe with one own task; merged values by method."""
    return ProbeRecord(
        step=step,
        surrogate=surrogate,
        expert=Estimate(value=expert),
        merges={
            method: MergeResult(
                scale=0.5,
                inside=True,
                tried=[(0.5, value)],
                merged=value,
                retention=None,
                tasks={
                    "own": TaskResult(
                        base=0.0,
                        expert=expert,
                        merged=Estimate(value=value),
                        retention=None,
                        normalised=None,
                    )
                },
            )
            for method, value in merged.items()
        },
    )


def metrics(step: int, norm: float, relative: float | None = 0.1) -> MetricsRecord:
    return MetricsRecord(
        step=step, norm=norm, relative_norm=relative, growth=0.0, groups={}, layers={}, top_mass={}
    )


def merged_curve(values: Sequence[float], *, greater: bool = True, every: int = 10) -> History:
    """Probes of TIES at 10, 20, …; the expert's metric stands still."""
    probes = [probe(every * (i + 1), 0.5, ties=value) for i, value in enumerate(values)]
    return History([start("ties", greater=greater), *probes])


def curves(greater: bool = True, **series: Sequence[float]) -> History:
    """Probes of several methods at 10, 20, …, from one series a method; ``expert`` is the expert's own."""
    expert = series.pop("expert", [0.5] * len(next(iter(series.values()))))
    probes = [
        probe(10 * (i + 1), expert[i], **{method: values[i] for method, values in series.items()})
        for i in range(len(expert))
    ]
    return History([start(*series, greater=greater), *probes])


def resumed_with_peers(surrogates: Sequence[float], merged: Sequence[float]) -> History:
    """Probes at 10, 20, …; from some step on merged with a peer. The expert does as its merges do."""
    steps = count(10, 10)
    first = [probe(next(steps), value, surrogate=True, ties=value) for value in surrogates]
    then = [probe(next(steps), value, ties=value) for value in merged]
    begun = replace(start("ties"), surrogate=True)
    resumed = replace(start("ties", step=first[-1].step), peers={"law": 1.0})
    return History([begun, *first, ResumeRecord(step=resumed.step, changed=["peers"]), resumed, *then])


_number = st.floats(allow_nan=False, allow_infinity=False)
_maybe = st.none() | _number
_name = st.text(max_size=8)
_names = st.lists(_name, max_size=3)
_estimates = st.builds(Estimate, value=_number, n=st.none() | st.integers(0, 10**9), low=_maybe, high=_maybe)
_tasks = st.dictionaries(
    _name,
    st.builds(
        TaskResult,
        base=_number,
        expert=_number,
        merged=_estimates,
        retention=st.none() | _estimates,
        normalised=_maybe,
    ),
    max_size=3,
)
_merges = st.dictionaries(
    _name,
    st.builds(
        MergeResult,
        scale=_number,
        inside=st.booleans(),
        tried=st.lists(st.tuples(_number, _number), max_size=3),
        merged=_number,
        retention=_maybe,
        tasks=_tasks,
    ),
    max_size=3,
)
_by_name = st.dictionaries(_name, _number, max_size=3)
_perhaps_by_name = st.dictionaries(_name, _maybe, max_size=3)
_method = st.fixed_dictionaries(
    {"label": _name, "method": _name, "density": _number, "seed": st.integers(-(2**53), 2**53)}
)
_step = st.integers(0, 10**12)

RECORDS = {
    "start": st.builds(
        StartRecord,
        step=_step,
        base=_name,
        peers=_by_name,
        surrogate=st.booleans(),
        metric=st.none() | _name,
        greater_is_better=st.booleans(),
        methods=st.lists(_method, max_size=3),
        references=st.dictionaries(_name, _by_name, max_size=3),
        unmerged=_names,
    ),
    "metrics": st.builds(
        MetricsRecord,
        step=_step,
        norm=_number,
        relative_norm=_maybe,
        growth=_number,
        groups=_by_name,
        layers=st.dictionaries(st.integers(0, 200), _number, max_size=5),
        top_mass=_perhaps_by_name,
        cosine=_perhaps_by_name,
        sign_conflict=_perhaps_by_name,
        norm_ratio=_maybe,
    ),
    "probe": st.builds(
        ProbeRecord,
        step=_step,
        surrogate=st.booleans(),
        expert=_estimates,
        merges=_merges,
        alone=_by_name,
    ),
    "decision": st.builds(DecisionRecord, step=_step, reason=st.text(max_size=30), acted=st.booleans()),
    "resume": st.builds(ResumeRecord, step=_step, changed=_names),
}
"""A strategy for each kind of record."""
