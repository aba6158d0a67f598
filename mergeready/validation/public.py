"""What may leave this machine: reports without local paths, and texts without anything private."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergeready.errors import OptionError, listing
from mergeready.merging.provenance import public_name
from mergeready.validation.report import Report

_LOCAL_PATH = re.compile(r"(?<![\w:.])(?:/|~/|\.\.?/|[A-Za-z]:\\)[^\s,;:)\"']+")
PRIVATE: Mapping[str, re.Pattern[str]] = {
    "a local path": re.compile(
        r"(?<![\w:/.])(?:/(?:home|root|Users|Volumes|tmp|mnt|data|scratch|workspace|fsx|gpfs|lustre|nfs|content/drive|"
        r"kaggle/(?:input|working))/[^\s\"'`)]+|[A-Za-z]:\\\\?[^\s\"']+)"
    ),
    "an access token": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|gh[pousr]_[A-Za-z0-9]{30,})\b"
    ),
    "an e-mail address": re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,190}[a-z]{2,}\b"),
}


def without_paths(text: str) -> str:
    """A message without local paths.

    >>> without_paths("no card in /home/me/law, 3 of 4 tensors")
    'no card in …, 3 of 4 tensors'
    """
    return _LOCAL_PATH.sub("…", text)


def public_report(report: Report, name: str | None = None) -> Report:
    """The report without local paths, to be shared; figures and verdicts are the same.

    Args:
        report: The report.
        name: How others know the expert; the last part of its path by default.
    """
    pairs = report.pairs
    if pairs is not None:
        labels = [name or public_name(pairs.labels[0]), *map(public_name, pairs.labels[1:])]
        pairs = replace(pairs, labels=labels)
    verdicts = [
        replace(v, message=without_paths(v.message), where=tuple(map(without_paths, v.where)))
        for v in report.verdicts
    ]
    return replace(
        report,
        expert=name or public_name(report.expert),
        verdicts=verdicts,
        facts=_without_paths(report.facts),
        pairs=pairs,
    )


def require_public(texts: Mapping[str, str]) -> None:
    """Raise if a text holds something private. The message says where and what kind, never the thing itself.

    Args:
        texts: Texts by the name of their file.

    Raises:
        OptionError: If one does; all are listed.
    """
    found = [
        f"{kind} in {place}"
        for place, text in texts.items()
        for kind, rule in PRIVATE.items()
        if rule.search(text)
    ]
    if found:
        raise OptionError(f"nothing was uploaded, since there is {listing(found)}. Take it out first.")


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    return [_without_paths(item) for item in value] if isinstance(value, list | tuple) else value
