"""The cells of a study: what is computed, in which order, and what a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mergeready.errors import OptionError, listing
from mergeready.study.settings import Arm, StudySettings

EXPERT = "expert"


@dataclass(frozen=True)
class Cell:
    """One result of a study.

    Attributes:
        arm: How experts were trained.
        seed: Of data and training.
        at: Which checkpoint: a step, or a pick such as ``best_validation``.
        method: Label of the merge method; ``expert`` for base and experts without merging.
        count: Number of experts.
    """

    arm: str
    seed: int
    at: str
    method: str
    count: int

    @property
    def key(self) -> str:
        """Its name, which is its path among the results as well.

        >>> Cell("plain", 0, "64", "ties", 8).key
        'plain/0/64/ties-8'
        """
        return f"{self.arm}/{self.seed}/{self.at}/{self.method}-{self.count}"


def cells_of(settings: StudySettings, tasks: int) -> Iterator[Cell]:
    """All cells, in the order of computation: late checkpoints first, since scales are found from late to early.

    Raises:
        OptionError: If more experts are to be merged than there are tasks.
    """
    counts = settings.counts or [tasks]
    if max(counts) > tasks:
        raise OptionError(f"`counts` names {max(counts)} experts, but there are {tasks} tasks.")
    moments = [str(step) for step in reversed(settings.steps)] + list(settings.picks)
    for arm in settings.arms:
        for at in moments:
            for seed in settings.seeds:
                yield Cell(arm, seed, at, EXPERT, tasks)
                for method in settings.methods:
                    for count in counts:
                        yield Cell(arm, seed, at, method, count)


def find_cell(settings: StudySettings, tasks: int, key: str) -> Cell:
    """The cell of a key.

    Raises:
        OptionError: If there is none; the message lists what there is.
    """
    known = {cell.key: cell for cell in cells_of(settings, tasks)}
    if key not in known:
        raise OptionError(f"there is no cell {key!r}; there are {listing(known)}.")
    return known[key]


def run_digest(settings: StudySettings, arm: Arm, task: str, seed: int) -> str:
    """What a training run depends on, as a short hash. Arms that train alike share their runs."""
    return _digest(
        {
            "suite": _given(settings.suite),
            "arm": _given(arm),
            "task": task,
            "seed": seed,
            "total": max(settings.steps),
            "metric": settings.metric,
        }
    )


def cell_digest(settings: StudySettings, cell: Cell, tasks: list[str]) -> str:
    """What a cell depends on, as a short hash: a result with another one is of other settings."""
    arm = settings.arms[cell.arm]
    parts: dict[str, Any] = {
        "runs": [run_digest(settings, arm, task, cell.seed) for task in tasks],
        "at": cell.at,
        "count": cell.count,
        "steps": settings.steps if cell.at in settings.picks else None,
    }
    if cell.method != EXPERT:
        parts["method"] = _given(settings.methods[cell.method])
        parts["max_evaluations"] = settings.max_evaluations
    return _digest(parts)


def base_digest(settings: StudySettings, tasks: list[str]) -> str:
    """What the base's results depend on, as a short hash."""
    return _digest({"suite": _given(settings.suite), "metric": settings.metric, "tasks": tasks})


def _given(settings: BaseModel) -> Any:
    """What differs from the defaults, so that results outlive settings that are added later."""
    return settings.model_dump(mode="json", exclude_defaults=True)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
