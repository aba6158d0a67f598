"""Times that are measured anew change times alone, and only of runs that train as they did."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.study_times import retime
from mergeready.study.run import Runner
from mergeready.study.settings import load_study
from tests.study.conftest import study_file  # noqa: F401 - a fixture

TIMES = re.compile(r'"cpu_seconds":[\d.e+-]+')
OLD = '"cpu_seconds":1000000000.0'


def texts(folder: Path) -> dict[str, str]:
    return {
        str(path): path.read_text("utf-8")
        for kind in ("runs", "cells")
        for path in (folder / kind).rglob("*.json")
    }


def test_times_alone_change_and_only_of_the_arms_that_are_named(study_file: Path, tmp_path: Path) -> None:  # noqa: F811
    settings, folder = load_study(study_file), tmp_path / "done"
    Runner(settings, folder).run()
    for path, text in texts(folder).items():
        Path(path).write_text(TIMES.sub(OLD, text), encoding="utf-8")
    before, (first, second) = texts(folder), settings.arms
    retime(settings, folder, [first])
    after = texts(folder)
    changed = {path for path, text in after.items() if text != before[path]}
    assert {path: TIMES.sub(OLD, text) for path, text in after.items()} == before
    expert = {path for path in after if f"/cells/{first}/" in path and "/expert-" in path}
    assert expert
    assert expert <= changed
    assert not any(f"/cells/{second}/" in path for path in changed)
    assert sum("/runs/" in path for path in changed) == len(settings.seeds) * len(settings.tasks or [0] * 3)

    run = next(path for path in changed if "/runs/" in path)
    broken = json.loads(after[run])
    broken["losses"][0] += 1
    Path(run).write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(RuntimeError, match="otherwise than it did"):
        retime(settings, folder, [first])


def test_times_against_another_arm_are_at_the_pace_at_which_that_one_was_measured(
    study_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings, folder = load_study(study_file), tmp_path / "done"
    Runner(settings, folder).run()
    for path, text in texts(folder).items():
        Path(path).write_text(TIMES.sub(OLD, text), encoding="utf-8")
    before, (first, second) = texts(folder), settings.arms
    retime(settings, folder, [second], against=first)
    changed = {path: text for path, text in texts(folder).items() if text != before[path]}
    assert changed
    assert not any(f"/cells/{first}/" in path for path in changed)
    times = [float(word.partition(":")[2]) for text in changed.values() for word in TIMES.findall(text)]
    assert all(1e7 < seconds < 1e11 for seconds in times), "of seconds that took the first arm 1e9"
