"""Names of experts for tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence


def short_labels(labels: Sequence[str]) -> list[str]:
    """The last part of each path, as long as these differ; the labels themselves otherwise.

    >>> short_labels(["experts/law", "experts/code/"])
    ['law', 'code']
    """
    short = [label.rstrip("/").rpartition("/")[2] for label in labels]
    return short if len(set(short)) == len(short) else list(labels)


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """The labels, numbered where one occurs again, so that they can be keys.

    >>> distinct_labels(["law", "code", "law"])
    ['law', 'code', 'law (2)']
    """
    made: dict[str, None] = {}
    for label in labels:
        name, count = label, 1
        while name in made:
            count += 1
            name = f"{label} ({count})"
        made[name] = None
    return list(made)
