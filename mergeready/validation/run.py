from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergeready.errors import MergeReadyError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.experts.open import ExpertLike
from mergeready.metrics.all_pairs import EstimatedComparison
from mergeready.validation.check import (
    CHECKS,
    COULD_NOT_RUN,
    LEVELS,
    Check,
    Level,
    Limits,
    NotCheckedError,
    Verdict,
)
from mergeready.validation.evaluation import Evaluation
from mergeready.validation.report import Report
from mergeready.validation.subject import Subject
from mergeready.validation.thresholds import read_thresholds
from mergeready.weights.open import WeightsLike

_LIBRARIES = ("mergeready", "torch", "safetensors")


def validate(
    expert: str | Path,
    base: WeightsLike | Base | None = None,
    *,
    peers: Sequence[ExpertLike | Fingerprint] = (),
    evaluation: Evaluation | None = None,
    level: Level = "composition",
    thresholds: str | Path | None = None,
    revision: str | None = None,
) -> Report:
    """Check an expert before it is shared: its files, its fit to the base, what it does, and what merging does to it.

    Checks run from cheap to dear; one that lacks something (a base, peers, an evaluation, a step that failed) is
    reported as *not checked* with the reason, never as passed. Nothing is executed from the expert's folder, and
    pickle files are not opened.

    Args:
        expert: Its folder or hub id.
        base: The base it was trained from.
        peers: Other experts on the base, or fingerprints of some.
        evaluation: How to look at its behaviour, alone and merged.
        level: The deepest level to check.
        thresholds: A YAML file with thresholds of your own.
        revision: Commit, tag or branch of a hub id.

    Raises:
        FormatError: If there is nothing to validate, or the thresholds cannot be read.
        OptionError: If the level or a threshold is unknown, or the expert is one of its own peers.
    """
    if level not in LEVELS:
        raise OptionError(f"`level` must be one of {', '.join(LEVELS)}, not {level!r}.")
    limits = read_thresholds(thresholds)
    subject = Subject(expert, base, peers, evaluation=evaluation, revision=revision)
    wanted = LEVELS[: LEVELS.index(level) + 1]
    verdicts = [run_check(c, subject, limits.get(c.id, {})) for c in CHECKS if c.level in wanted]
    return Report(
        expert=str(expert),
        level=level,
        verdicts=_each_reason_once(verdicts),
        facts=_facts(subject),
        pairs=_pairs(subject, level),
    )


def run_check(chosen: Check, subject: Subject, limits: Limits) -> Verdict:
    """One check's verdict, whatever happens inside it."""
    about: dict[str, Any] = {
        "id": chosen.id,
        "level": chosen.level,
        "severity": chosen.severity,
        "title": chosen.title,
    }
    try:
        found = chosen.run(subject, limits)
    except NotCheckedError as reason:
        return Verdict(**about, status="not checked", message=_printable(str(reason)))
    except (MergeReadyError, OSError) as error:
        return Verdict(**about, status="not checked", message=_printable(f"{COULD_NOT_RUN}{error}"))
    about["severity"] = found.severity or chosen.severity
    return Verdict(
        **about,
        status="passed" if found.passed else "failed",
        message=_printable(found.message),
        fix="" if found.passed else found.fix or chosen.fix,
        value=found.value,
        threshold=found.threshold,
        where=tuple(map(_printable, found.where)),
    )


def _printable(text: str) -> str:
    """Names in files of others may hold control characters, which could rewrite verdicts on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _each_reason_once(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One damaged file keeps many checks from running: the first says why, the others refer to it."""
    first: dict[str, str] = {}
    shortened = []
    for verdict in verdicts:
        reason = verdict.message.removeprefix(COULD_NOT_RUN)
        told = first.setdefault(reason, verdict.id)
        is_repeated = verdict.could_not_run and told != verdict.id
        shortened.append(replace(verdict, message=f"{COULD_NOT_RUN}see {told}") if is_repeated else verdict)
    return shortened


def _pairs(subject: Subject, level: Level) -> EstimatedComparison | None:
    if level != LEVELS[-1]:
        return None
    try:
        return subject.pairs
    except (MergeReadyError, NotCheckedError):
        return None  # C401 says why


def _facts(subject: Subject) -> dict[str, Any]:
    facts: dict[str, Any] = {"versions": {name: version(name) for name in _LIBRARIES}}
    if subject.revision is not None:
        facts["revision"] = subject.revision
    for name, read in (
        ("format", lambda: subject.adapter_kind or "full"),
        ("base_fingerprint", lambda: subject.base.identity.fingerprint),
        ("base_checked", lambda: subject.expert.base_checked),
        ("notes", lambda: list(subject.expert.notes)),
    ):
        try:
            facts[name] = read()
        except (MergeReadyError, NotCheckedError):
            facts[name] = None  # the verdicts say why
    return facts
