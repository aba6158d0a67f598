from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from mergeready.errors import OptionError
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.record import write_record
from mergeready.training.history import History
from mergeready.weights.atomic import new_file, new_folder
from mergeready.weights.ranks import Ranks

Save = Callable[[Path], None]
"""Writes the model of this moment into an existing empty folder, so that it can be loaded as an expert.

Called on every rank of a run, as a sharded model has to be gathered by all; the folder exists on the first rank only,
which alone writes."""

EXPERT_BEST = "expert-best"
MERGE_BEST = "merge-best"
PARETO = "pareto"


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Which steps of a run are worth keeping.

    Only merges with the same peers are compared: a run that is resumed with others picks among the steps since then.

    Attributes:
        expert_best: Keep the step with the best expert metric.
        merge_best: Keep, for each probed merge method, the step with the best merged metric.
        pareto: Keep up to this many steps at which no other step is better in both, best merged first.
    """

    expert_best: bool = True
    merge_best: bool = True
    pareto: int = 0

    def __post_init__(self) -> None:
        if self.pareto < 0:
            raise OptionError(f"`pareto` must not be negative, not {self.pareto}.")

    def select(self, history: History, available: Iterable[int] | None = None) -> dict[str, int]:
        """Label to step; a pure function of the history.

        Labels are ``expert-best``, ``merge-best`` (``merge-best:<method>`` when several methods are probed) and
        ``pareto-1`` and so on. Of equal steps the earliest counts.

        Args:
            history: The run so far.
            available: Steps whose weights exist; only they can be Pareto picks.
        """
        picked: dict[str, int] = {}
        sign, probes = history.alike(merged=False)
        if self.expert_best and probes:
            picked[EXPERT_BEST] = _best_step([(p.step, p.expert.value) for p in probes], sign)
        sign, probes = history.alike(merged=True)
        methods = [method for method in history.methods if any(method in probe.merges for probe in probes)]
        if self.merge_best:
            for method in methods:
                label = MERGE_BEST if len(methods) == 1 else f"{MERGE_BEST}:{method}"
                points = [(p.step, p.merges[method].merged) for p in probes if method in p.merges]
                picked[label] = _best_step(points, sign)
        if self.pareto and methods:
            steps = pareto_steps(history, methods[0])
            usable = steps if available is None else [step for step in steps if step in set(available)]
            picked |= {f"{PARETO}-{rank}": step for rank, step in enumerate(usable[: self.pareto], 1)}
        return picked


def pareto_steps(history: History, method: str) -> list[int]:
    """Steps that no other step beats in expert and merged metric at once, best merged first."""
    sign, probes = history.alike(merged=True)
    points = [
        (sign * p.merges[method].merged, sign * p.expert.value, p.step) for p in probes if method in p.merges
    ]
    points.sort(key=lambda point: (-point[0], -point[1], point[2]))
    kept: list[int] = []
    best_expert = float("-inf")
    for _, expert, step in points:
        if expert > best_expert:
            kept.append(step)
            best_expert = expert
    return kept


class PickStore:
    """The folder that holds picked checkpoints, one subfolder a step, and ``picks.json`` that says why.

    A checkpoint that is no longer picked stays until :meth:`prune`, so that a run that is killed and resumed
    from its last saved state still finds what that state refers to.

    Args:
        folder: Where to keep them.
        picks: What to keep.
        save: Writes the model.
        base: Recorded beside each pick, so that it can be checked when it is merged.
        ranks: The run's ranks; the first one writes and deletes.
    """

    def __init__(
        self, folder: Path, picks: Picks, save: Save, base: BaseIdentity, ranks: Ranks | None = None
    ) -> None:
        self.folder, self.picks, self._save, self._base = folder, picks, save, base
        self._ranks = ranks or Ranks.alone()

    def update(self, history: History) -> dict[str, int]:
        """Save the model if its step, the newest probe, is picked; rewrite ``picks.json``. Every rank calls it."""
        step, ranks = history.probes[-1].step, self._ranks
        selected = ranks.on_first(lambda: self.picks.select(history, available={*self.saved(), step}))
        if step in selected.values():
            self._save_step(step)
        else:
            # What lies there is of a run that was resumed from before this step, and may have gone another way.
            ranks.on_first(lambda: shutil.rmtree(self.path(step), ignore_errors=True))
        ranks.on_first(lambda: self._write_index(history, selected))
        return selected

    def _save_step(self, step: int) -> None:
        with ExitStack() as stack:
            folder = self.path(step)
            with self._ranks.together():
                if self._ranks.is_first:
                    folder = stack.enter_context(new_folder(self.path(step), overwrite=True))
            with self._ranks.together():
                self._save(folder)
                if self._ranks.is_first:
                    write_record(folder, self._base, step=step)

    def prune(self, history: History) -> None:
        """Delete checkpoints that are no longer picked; rewrite ``picks.json``. No collective."""
        if not self._ranks.is_first:
            return
        selected = self.selected(history)
        for step in self.saved():
            if step not in selected.values():
                shutil.rmtree(self.path(step))
        self._write_index(history, selected)

    def selected(self, history: History) -> dict[str, int]:
        """Label to step, given the checkpoints that exist."""
        return self.picks.select(history, available=self.saved())

    def saved(self) -> list[int]:
        """Steps whose checkpoints exist."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def path(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.folder / f"step-{step:06}"

    def _write_index(self, history: History, selected: dict[str, int]) -> None:
        probes = {probe.step: probe for probe in history.probes}
        content = {
            label: {
                "step": step,
                "folder": self.path(step).name if self.path(step).is_dir() else None,
                "expert": asdict(probes[step].expert),
                "merged": {method: result.merged for method, result in probes[step].merges.items()},
                "surrogate": probes[step].surrogate,
                "resolution": _resolution(history, step),
            }
            for label, step in selected.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / "picks.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _best_step(points: list[tuple[int, float]], sign: float) -> int:
    return max(points, key=lambda point: (sign * point[1], -point[0]))[0]


def _resolution(history: History, step: int) -> float | None:
    """What rounding left to be seen of the task vector when it was last measured; see ``MetricsRecord``."""
    measured = [record for record in history.metrics if record.step <= step]
    return measured[-1].resolution if measured else None
