"""Scalars of a run that choose checkpoints or stop training: what a framework has to know of them."""

from __future__ import annotations

import math

from mergeready.errors import OptionError, listing
from mergeready.training.history import History
from mergeready.training.records import StartRecord
from mergeready.training.scalars import PREFIX, merged_name

RETENTION = f"{PREFIX}retention/"
"""How names of retentions begin."""

_PROBED = ("expert", "merged", "surrogate", "retention", "scale")


def direction(name: str, start: StartRecord) -> tuple[str, bool] | None:
    """What a scalar is, and whether more of it is better; None where neither more nor less is.

    Args:
        name: Its name, with prefix.
        start: What the run started with.

    Raises:
        OptionError: If it is one of probes, and those of this run do not give it.

    >>> start = StartRecord(step=0, base="", metric="loss", greater_is_better=False, methods=[{"label": "ties"}])
    >>> direction("mergeready/merged/ties", start), direction("mergeready/retention/ties", start)
    (('loss', False), ('retention', True))
    >>> direction("mergeready/norm", start)
    """
    kind = name.removeprefix(PREFIX).partition("/")[0]
    if kind not in _PROBED:
        return None
    if start.metric is None:
        raise OptionError(f"`{name}` comes from probes, and the run has none: give the callback a `probe`.")
    labels = [method["label"] for method in start.methods]
    known = [f"{PREFIX}expert", *(merged_name(label, surrogate=start.surrogate) for label in labels)]
    known += [f"{PREFIX}{kind}/{label}" for kind in ("retention", "scale") for label in labels]
    if name not in known:
        raise OptionError(f"no probe of this run gives `{name}`. They give {listing(known)}.")
    if kind == "scale":
        return None
    return ("retention", True) if kind == "retention" else (start.metric, start.greater_is_better)


def undefined(history: History) -> dict[str, float]:
    """NaN for what the newest probe could not tell: the retention of an expert that is no better than the base.

    Without it, a framework would go by the value of an earlier step, or find none at all.
    """
    merges = history.probes[-1].merges if history.probes else {}
    return {RETENTION + label: math.nan for label, result in merges.items() if result.retention is None}
