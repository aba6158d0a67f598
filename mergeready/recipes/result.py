"""What came out of a run, as a file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mergeready.errors import FormatError
from mergeready.weights.atomic import new_file

RESULT_NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run.

    Attributes:
        metric: What was measured.
        scores: Split to the last weights' value of it.
        expert: Folder of the last weights, below the run's.
        steps: Optimizer steps that were taken.
        stopped: Why the run was stopped before its end, if it was.
        picks: Label to the folder of a checkpoint worth keeping, below the run's.
        merged: Of a team: merge method to the merged model's values on every member's task.
        scales: Of a team: merge method to the scale that was best on validation data.
    """

    metric: str | None
    scores: Mapping[str, float] = field(default_factory=dict)
    expert: str | None = None
    steps: int = 0
    stopped: str | None = None
    picks: Mapping[str, str] = field(default_factory=dict)
    merged: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)


def write_result(folder: Path, result: RunResult) -> None:
    """Write it; its presence says that the run is complete."""
    with new_file(folder / RESULT_NAME) as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def read_result(folder: Path) -> RunResult:
    """Read it again.

    Raises:
        FormatError: If it is not what this version writes.
    """
    path = folder / RESULT_NAME
    try:
        return RunResult(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(
            f"{path} cannot be understood ({error}); delete it to evaluate the run again."
        ) from error
