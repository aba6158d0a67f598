"""Measures training times of some arms of a study anew, one run of each in turn: machines change speed by the hour.

    python -m benchmarks.study_times techniques_eight cosine kronecker_filter

Each run has to train as it did before; nothing but times changes in the results.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study_words import KEPT, STUDIES
from mergeready.study.cells import EXPERT, Cell, run_digest
from mergeready.study.settings import StudySettings, load_study
from mergeready.study.store import Store
from mergeready.study.suite import StudySuite, choose_tasks, open_suite
from mergeready.study.train import train_run
from mergeready.weights.json_file import read_json_object


def retime(settings: StudySettings, folder: Path, arms: Sequence[str]) -> None:
    """Train some arms again, in turn, and write the times into their runs and cells, one seed after the other.

    Args:
        settings: The study.
        folder: Its results, with these arms.
        arms: Labels of arms.

    Raises:
        RuntimeError: If a run trains otherwise than it did.
    """
    for seed in settings.seeds:
        suite = open_suite(settings.suite, seed)
        times: dict[str, dict[str, float]] = {arm: {} for arm in arms}
        for task in choose_tasks(suite, settings.tasks):
            for arm in arms:
                times[arm][task] = _time(settings, suite, folder, arm, task, seed)
                print(arm, seed, task, f"{times[arm][task]:.1f}", flush=True)
        for arm, spent in times.items():
            for at in (*map(str, settings.steps), *settings.picks):
                _write(folder, Cell(arm, seed, at, EXPERT, len(spent)), spent)


def _time(
    settings: StudySettings, suite: StudySuite, folder: Path, label: str, task: str, seed: int
) -> float:
    arm = settings.arms[label]
    key = f"{task}-{seed}-{run_digest(settings, arm, task, seed)}"
    store = Store(folder)
    kept = store.read("runs", key, key)
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
    if made["losses"] != kept["losses"]:
        raise RuntimeError(f"{label} trains on {task} with seed {seed} otherwise than it did.")
    store.write("runs", key, kept | {"cpu_seconds": made["cpu_seconds"]})
    return float(made["cpu_seconds"])


def _write(folder: Path, cell: Cell, spent: dict[str, float]) -> None:
    content = read_json_object(folder / "cells" / f"{cell.key}.json", "Run the study first.")
    runs = {task: run | {"cpu_seconds": spent[task]} for task, run in content["runs"].items()}
    Store(folder).write("cells", cell.key, content | {"runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("arms", nargs="+")
    given = parser.parse_args()
    retime(load_study(STUDIES / f"{given.study}.yaml"), KEPT / given.study, given.arms)


if __name__ == "__main__":
    main()
