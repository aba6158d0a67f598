"""The runner: every cell of a study that is not there yet, and one cell again from scratch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.merging.evaluation import is_greater_better
from mergeready.study.cells import EXPERT, Cell, base_digest, cell_digest, cells_of, find_cell, run_digest
from mergeready.study.checkpoints import find_checkpoint, given_checkpoint, saved_step
from mergeready.study.evaluate import base_state, evaluate_experts, evaluate_merged, evaluate_task, metric_of
from mergeready.study.settings import StudySettings
from mergeready.study.store import Store
from mergeready.study.suite import StudySuite, StudyTask, choose_tasks, open_suite
from mergeready.study.train import train_run
from mergeready.weights.atomic import new_folder

WARM_RATIO = 1.6
_TIMES = ("cpu_seconds",)


@dataclass(frozen=True)
class Rerun:
    """A cell that was computed again from scratch.

    Attributes:
        cell: Which.
        differences: What differs from the kept result, as sentences; empty where all numbers are equal.
    """

    cell: Cell
    differences: tuple[str, ...]


@dataclass(eq=False)
class Runner:
    """Computes a study's cells, and keeps them.

    Args:
        settings: The study.
        folder: Where results go.
        checkpoints: Where training runs keep their checkpoints; beside the results by default.
        tell: Told what is being done.

    Attributes:
        trained: Number of training runs that were made.
    """

    settings: StudySettings
    folder: Path
    checkpoints: Path | None = None
    tell: Callable[[str], None] = lambda text: None
    trained: int = 0
    _opened: dict[int, tuple[StudySuite, dict[str, StudyTask]]] = field(default_factory=dict)
    _models: dict[int, tuple[nn.Module, dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The results."""
        return Store(self.folder)

    def run(self, limit: int | None = None) -> int:
        """Compute what is missing, or the next ``limit`` of it.

        Returns:
            Number of cells that were computed.

        Raises:
            MergeReadyError: If training, merging or an evaluation is not possible; what is finished is kept.
        """
        names = self._names()
        computed = 0
        for cell in cells_of(self.settings, len(names)):
            if computed == limit:
                break
            if self._kept(cell) is None:
                self.store.write("cells", cell.key, self._compute(cell, self._first_scales(cell)))
                computed += 1
                self.tell(f"{cell.key} is done")
        return computed

    def results(self) -> dict[Cell, dict[str, Any]]:
        """Every cell that is there."""
        found = {cell: self._kept(cell) for cell in cells_of(self.settings, len(self._names()))}
        return {cell: content for cell, content in found.items() if content is not None}

    def rerun(self, key: str) -> Rerun:
        """Train what a cell needs, merge and evaluate again, in a folder of its own, and compare with what is kept.

        Raises:
            OptionError: If there is no such cell, or nothing kept to compare with.
        """
        cell = find_cell(self.settings, len(self._names()), key)
        kept = self._kept(cell)
        if kept is None:
            raise OptionError(f"{key} was not computed yet; run the study without `only` first.")
        with tempfile.TemporaryDirectory(prefix="mergeready-study-") as scratch:
            fresh = Runner(self.settings, Path(scratch), None, self.tell, _opened=self._opened)
            if cell.at in self.settings.picks:
                for step in reversed(self.settings.steps):
                    expert = Cell(cell.arm, cell.seed, str(step), EXPERT, len(self._names()))
                    fresh.store.write("cells", expert.key, fresh._compute(expert, []))
            again = fresh._compute(cell, kept.get("first_scales", []))
        return Rerun(cell, tuple(_differences(kept, again)))

    def _names(self) -> list[str]:
        if self.settings.tasks is not None:
            return list(self.settings.tasks)
        # Kept, so that tables can be drawn where the suite's data are not at hand.
        digest = base_digest(self.settings, [])
        kept = self.store.read("suite", "tasks", digest)
        if kept is None:
            kept = {"digest": digest, "tasks": list(self._suite(self.settings.seeds[0])[1])}
            self.store.write("suite", "tasks", kept)
        return list(kept["tasks"])

    def _suite(self, seed: int) -> tuple[StudySuite, dict[str, StudyTask]]:
        if seed not in self._opened:
            suite = open_suite(self.settings.suite, seed)
            self._opened[seed] = suite, choose_tasks(suite, self.settings.tasks)
        return self._opened[seed]

    def _model(self, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        if seed not in self._models:
            model = self._suite(seed)[0].model()
            self._models[seed] = model, base_state(model)
        return self._models[seed]

    def _kept(self, cell: Cell) -> dict[str, Any] | None:
        return self.store.read("cells", cell.key, cell_digest(self.settings, cell, self._names()))

    def _compute(self, cell: Cell, scales: list[float]) -> dict[str, Any]:
        names = self._names()[: cell.count]
        (model, base), tasks = self._model(cell.seed), self._suite(cell.seed)[1]
        steps = self._steps(cell, names)
        paths = {name: self._checkpoint(cell, name, step) for name, step in steps.items()}
        head: dict[str, Any] = {
            "cell": {
                "arm": cell.arm,
                "seed": cell.seed,
                "at": cell.at,
                "method": cell.method,
                "count": cell.count,
            },
            "digest": cell_digest(self.settings, cell, self._names()),
        }
        at_base, metric = self._base(cell.seed)
        head["metric"] = metric
        if cell.method == EXPERT:
            experts = evaluate_experts(model, base, paths, tasks, metric)
            base_of = {name: at_base[name] for name in names}
            return head | {
                "tasks": experts,
                "base": base_of,
                "runs": self._records(cell, names),
                "steps": steps,
            }
        made = evaluate_merged(
            model,
            base,
            paths,
            tasks,
            self.settings.methods[cell.method],
            at_base={name: at_base[name]["validation"] for name in names},
            scales=scales,
            max_evaluations=self.settings.max_evaluations,
            metric=metric,
        )
        return head | made | {"steps": steps}

    def _steps(self, cell: Cell, names: list[str]) -> dict[str, int]:
        """The step of each expert that a cell merges."""
        if cell.at not in self.settings.picks:
            return dict.fromkeys(names, int(cell.at))
        validation = {}
        for step in self.settings.steps:
            expert = Cell(cell.arm, cell.seed, str(step), EXPERT, len(self._names()))
            kept = self._kept(expert)
            if kept is None:
                raise OptionError(f"{cell.key} needs {expert.key}, which was not computed.")
            validation[step] = {name: kept["tasks"][name]["validation"] for name in names}
        sign = 1.0 if is_greater_better(self._base(cell.seed)[1]) else -1.0
        # The earliest of equally good checkpoints: it has moved least.
        return {
            name: max(self.settings.steps, key=lambda step: (sign * validation[step][name], -step))
            for name in names
        }

    def _first_scales(self, cell: Cell) -> list[float]:
        """Around the best scale of the next later checkpoint, where that is known: most searches are short then."""
        if cell.method == EXPERT:
            return []
        choice = self.settings.methods[cell.method]
        later = [
            step for step in self.settings.steps if cell.at not in self.settings.picks and step > int(cell.at)
        ]
        nearest = str(later[0]) if later else str(self.settings.steps[-1])
        kept = (
            self._kept(Cell(cell.arm, cell.seed, nearest, cell.method, cell.count))
            if nearest != cell.at
            else None
        )
        if not choice.tune or kept is None or not kept["inside"] or kept["scale"] <= 0:
            return list(choice.scales)
        return [kept["scale"] / WARM_RATIO, kept["scale"], kept["scale"] * WARM_RATIO]

    def _base(self, seed: int) -> tuple[Mapping[str, Any], str]:
        """The base on every task, and the metric's name."""
        key, digest = (
            str(seed),
            base_digest(self.settings, self._names()),
        )
        kept = self.store.read("base", key, digest)
        if kept is None:
            model, tasks = self._model(seed)[0], self._suite(seed)[1]
            metric = metric_of(model, tasks, self.settings.metric)
            results = {name: evaluate_task(model, name, task, metric) for name, task in tasks.items()}
            kept = {"digest": digest, "metric": metric, "tasks": results}
            self.store.write("base", key, kept)
        return kept["tasks"], kept["metric"]

    def _checkpoint(self, cell: Cell, task: str, step: int) -> Path:
        arm = self.settings.arms[cell.arm]
        if arm.checkpoints is not None:
            return given_checkpoint(arm.checkpoints, task, cell.seed, step)
        folder, record = self._run(cell, task)
        return find_checkpoint(folder, saved_step(record["saved"], step))

    def _run(self, cell: Cell, task: str) -> tuple[Path, dict[str, Any]]:
        """The folder and the record of a training run, trained if need be."""
        arm = self.settings.arms[cell.arm]
        key = f"{task}-{cell.seed}-{run_digest(self.settings, arm, task, cell.seed)}"
        folder = (self.checkpoints or self.folder / "checkpoints") / key
        record = self.store.read("runs", key, key)
        if folder.is_dir() and record is not None and self._has_all_steps(record):
            return folder, record
        self.tell(f"training {cell.arm}, seed {cell.seed}, on {task}")
        with new_folder(folder, overwrite=True) as fresh:
            made = train_run(
                self._suite(cell.seed)[0],
                task,
                arm,
                cell.seed,
                fresh,
                steps=self.settings.steps,
                total=max(self.settings.steps),
                metric=self.settings.metric,
            )
            record = {"digest": key, "task": task, "seed": cell.seed, **made}
            self.store.write("runs", key, record)
        self.trained += 1
        return folder, record

    def _has_all_steps(self, record: Mapping[str, Any]) -> bool:
        """Whether a run kept every step that it reached; one that stopped is not asked for later ones."""
        needed = [step for step in self.settings.steps if step <= record["ended"] or not record["stopped"]]
        return set(needed) <= set(record["saved"])

    def _records(self, cell: Cell, names: list[str]) -> dict[str, Any]:
        """What is known of the training runs of a cell's arm."""
        arm = self.settings.arms[cell.arm]
        if arm.checkpoints is not None:
            return {}
        wanted = ("ended", "stopped", "cpu_seconds")
        records = {name: self._run(cell, name)[1] for name in names}
        return {name: {key: record[key] for key in wanted} for name, record in records.items()}


def _differences(kept: Any, again: Any, place: str = "") -> list[str]:
    """Where two results differ, apart from times."""
    if isinstance(kept, Mapping) and isinstance(again, Mapping):
        keys = [key for key in {**kept, **again} if key not in _TIMES]
        return [
            line
            for key in keys
            for line in _differences(kept.get(key), again.get(key), f"{place}.{key}".strip("."))
        ]
    if isinstance(kept, list | tuple) and isinstance(again, list | tuple) and len(kept) == len(again):
        pairs = enumerate(zip(kept, again, strict=True))
        return [line for index, (one, two) in pairs for line in _differences(one, two, f"{place}[{index}]")]
    return [] if kept == again else [f"{place} was {kept}, now {again}"]
