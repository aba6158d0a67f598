"""Names of experts for tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence


def own_name(label: str) -> str:
    """What an expert is called without where it lies: its folder's name, also where that is the working directory.

    >>> own_name("experts/law/"), own_name("org/law"), own_name(".") == own_name("../" + own_name("."))
    ('law', 'law', True)
    """
    return os.path.basename(os.path.abspath(label))


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
