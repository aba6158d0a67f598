"""Measures training times of some arms of a study anew, one run of each in turn: machines change speed by the hour.

    python -m benchmarks.study_times techniques_eight cosine kronecker_filter
    python -m benchmarks.study_times techniques_eight kronecker_filter --against cosine

Each run has to train as it did before, up to rounding; nothing but times changes in the results.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study_words import KEPT, STUDIES
from mergeready.study.cells import EXPERT, Cell, run_digest
from mergeready.study.settings import StudySettings, load_study
from mergeready.study.store import Store
from mergeready.study.suite import StudySuite, choose_tasks, open_suite
from mergeready.study.train import train_run
from mergeready.weights.json_file import read_json_object


def retime(settings: StudySettings, folder: Path, arms: Sequence[str], against: str | None = None) -> None:
    """Train some arms again, in turn, and write the times into their runs and cells, one seed after the other.

    Args:
        settings: The study.
        folder: Its results, with these arms.
        arms: Labels of arms.
        against: Another arm that takes turns with them and keeps its times: what is written are times at the pace at
            which that arm was measured, so that a few arms can be compared with all others.

    Raises:
        RuntimeError: If a run trains otherwise than it did.
    """
    for seed in settings.seeds:
        suite = open_suite(settings.suite, seed)
        timed = tuple(arms) if against is None else (against, *arms)
        runs: dict[str, dict[str, _Run]] = {arm: {} for arm in timed}
        for task in choose_tasks(suite, settings.tasks):
            for arm in timed:
                run = runs[arm][task] = _Run.of(settings, suite, folder, arm, task, seed)
                print(arm, seed, task, f"{run.seconds:.1f}", flush=True)
        pace = 1.0
        if against is not None:
            turns = runs.pop(against).values()
            pace = sum(run.kept["cpu_seconds"] for run in turns) / sum(run.seconds for run in turns)
        for arm, trained in runs.items():
            spent = {task: pace * run.seconds for task, run in trained.items()}
            for task, run in trained.items():
                Store(folder).write("runs", run.key, run.kept | {"cpu_seconds": spent[task]})
            for at in (*map(str, settings.steps), *settings.picks):
                _write(folder, Cell(arm, seed, at, EXPERT, len(spent)), spent)


@dataclass(frozen=True)
class _Run:
    """A run of a study that was trained once more.

    Attributes:
        key: Its place in the store.
        kept: What the study kept of it.
        seconds: CPU seconds that it took now.
    """

    key: str
    kept: dict[str, Any]
    seconds: float

    @classmethod
    def of(
        cls, settings: StudySettings, suite: StudySuite, folder: Path, label: str, task: str, seed: int
    ) -> _Run:
        arm = settings.arms[label]
        key = f"{task}-{seed}-{run_digest(settings, arm, task, seed)}"
        kept = Store(folder).read("runs", key, key)
        if kept is None:
            raise RuntimeError(f"{label} was not trained on {task} with seed {seed} yet.")
        with tempfile.TemporaryDirectory() as scratch:
            made = train_run(
                suite,
                task,
                arm,
                seed,
                Path(scratch),
                steps=settings.steps,
                total=max(settings.steps),
                metric=settings.metric,
            )
        # Other processors round otherwise in bf16.
        if not np.allclose(made["losses"], kept["losses"], rtol=0, atol=0.02):
            raise RuntimeError(f"{label} trains on {task} with seed {seed} otherwise than it did.")
        return cls(key, kept, float(made["cpu_seconds"]))


def _write(folder: Path, cell: Cell, spent: dict[str, float]) -> None:
    content = read_json_object(folder / "cells" / f"{cell.key}.json", "Run the study first.")
    runs = {task: run | {"cpu_seconds": spent[task]} for task, run in content["runs"].items()}
    Store(folder).write("cells", cell.key, content | {"runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--against", help="an arm that takes turns and keeps its times, which set the pace")
    given = parser.parse_args()
    retime(load_study(STUDIES / f"{given.study}.yaml"), KEPT / given.study, given.arms, given.against)


if __name__ == "__main__":
    main()
