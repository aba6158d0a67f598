from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergeready.errors import OptionError
from mergeready.experts.live import LiveExpert
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.evaluation import Evaluate, Score, is_greater_better, run_evaluation
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.method import MergeMethod
from mergeready.merging.registry import MethodLike, make_method
from mergeready.merging.scale_search import ScaleSearch, check_scales
from mergeready.merging.tune import FIRST_SCALES, MAX_EVALUATIONS, search_merged
from mergeready.training.bootstrap import estimate, retention
from mergeready.training.history import History
from mergeready.training.peers import OpenPeer
from mergeready.training.records import MergeResult, ProbeRecord, TaskResult
from mergeready.training.schedule import Schedule
from mergeready.training.surrogates import Surrogates, synthetic_peers
from mergeready.weights.guard import untouched

OWN = "own"
"""What the run's own task is called in records."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Merge the weights of this moment with the peers, in place; evaluate; put the weights back.

    Attributes:
        merge: One merge method or several; each has its own best scale, plateau and picks.
        scales: First grid of scales. It widens by itself until the best scale lies inside; later probes start
            around the best scale of the probe before.
        evaluate: Evaluates the run's own task; None lets the trainer do it.
        metric: Which metric counts; None if the evaluation returns one only.
        greater_is_better: Direction of the metric; None for "yes, unless its name says loss, error or perplexity", also
            in short, as wer, mse and nll do.
        schedule: When to probe.
        max_evaluations: Most scales to try per method in one probe.
        weights: One factor an expert, the run's own first; 1 each by default.
        surrogates: What stands in for peers while there are none.
    """

    merge: MethodLike | Sequence[MethodLike] = "task_arithmetic"
    scales: Sequence[float] = FIRST_SCALES
    evaluate: Evaluate | None = None
    metric: str | None = None
    greater_is_better: bool | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(time_budget=0.25))
    max_evaluations: int = MAX_EVALUATIONS
    weights: Sequence[float] | None = None
    surrogates: Surrogates = field(default_factory=Surrogates)

    def __post_init__(self) -> None:
        check_scales(self.scales)
        if self.max_evaluations < len(self.scales):
            raise OptionError(
                f"`max_evaluations` is {self.max_evaluations}, below the {len(self.scales)} `scales`."
            )
        _ = self.methods

    @property
    def methods(self) -> dict[str, MergeMethod]:
        """The methods by label: their names, with parameters where a name occurs more than once."""
        given = [self.merge] if isinstance(self.merge, str | MergeMethod) else list(self.merge)
        methods = [make_method(method) for method in given]
        names = [method.name for method in methods]
        labels = [m.name if names.count(m.name) == 1 else _long_label(m) for m in methods]
        if not labels or len(set(labels)) < len(labels):
            raise OptionError(f"`merge` must name different merge methods, not {labels}.")
        return dict(zip(labels, methods, strict=True))

    def is_greater_better(self, metric: str) -> bool:
        """Direction of a metric: as given, or by its name."""
        return is_greater_better(metric, self.greater_is_better)


@dataclass(frozen=True)
class Prober:
    """A probe bound to a run.

    Attributes:
        probe: What to do.
        live: The model in training.
        peers: The open peers; empty means surrogates.
        evaluate: Evaluates the own task.
        metric: The metric's name.
        references: By task: ``base``, and for a peer's task ``expert``, the values to compare with.
    """

    probe: Probe
    live: LiveExpert
    peers: Sequence[OpenPeer]
    evaluate: Evaluate
    metric: str
    references: Mapping[str, Mapping[str, Score]]

    @property
    def tasks(self) -> dict[str, Evaluate]:
        """Every task that is evaluated, the own one first."""
        return task_evaluations(self.evaluate, self.peers)

    def cost(self, reference_seconds: float) -> float:
        """Seconds that the first probe will take, as the references were measured with the same functions."""
        tasks = len(self.tasks)
        evaluations = 1 + len(self.probe.methods) * len(self.probe.scales) * tasks
        return reference_seconds / (2 * tasks - 1) * evaluations

    def run(self, step: int, history: History, known: Score | None = None) -> ProbeRecord:
        """Probe now.

        Args:
            step: The training step, for the record.
            history: Where the best scales of the last probe are read from.
            known: The expert's own score at this step, if it was evaluated already.

        Raises:
            EvaluationError: If an evaluation fails. The model is as it was.
        """
        expert = known or self._evaluate_unmerged()
        others: list[TaskVector] = list(self.peers)
        alone: dict[str, float] = {}
        if not others:
            others = synthetic_peers(self.live.vector, self.probe.surrogates)
            alone = self._alone()
        merges = {
            label: self._merge(method, others, expert, self._first_grid(label, history), history.sign)
            for label, method in self.probe.methods.items()
        }
        return ProbeRecord(
            step=step, surrogate=not self.peers, expert=estimate(expert), merges=merges, alone=alone
        )

    def _evaluate_unmerged(self) -> Score:
        with untouched(self.live.model, {}):
            return run_evaluation(self.evaluate, self.live.model, self.metric, OWN)

    def _alone(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with MergedInPlace(self.live, None, [], scale=0.0) as merged:
            for scale in self.probe.surrogates.alone_scales:
                merged.set_scale(scale)
                score = run_evaluation(self.evaluate, self.live.model, self.metric, OWN)
                found[f"{scale:g}"] = score.value
        return found

    def _merge(
        self,
        method: MergeMethod,
        others: Sequence[TaskVector],
        expert: Score,
        grid: Sequence[float],
        sign: float,
    ) -> MergeResult:
        with MergedInPlace(self.live, None, others, method, weights=self.probe.weights) as merged:
            search, scores = search_merged(
                merged,
                self.tasks,
                self.metric,
                grid,
                at_base={task: self.references[task]["base"] for task in self.tasks},
                greater_is_better=sign > 0,
                max_evaluations=self.probe.max_evaluations,
            )
        return self._result(search, scores, expert, sign)

    def _result(
        self, search: ScaleSearch, scores: Mapping[str, Score], expert: Score, sign: float
    ) -> MergeResult:
        tasks: dict[str, TaskResult] = {}
        for task, score in scores.items():
            reference = self.references[task]
            own_expert = expert if task == OWN else reference["expert"]
            tasks[task] = TaskResult(
                base=reference["base"].value,
                expert=own_expert.value,
                merged=estimate(score),
                retention=retention(score, reference["base"], own_expert, sign=sign),
                normalised=score.value / own_expert.value if own_expert.value else None,
            )
        kept = [result.retention.value for result in tasks.values() if result.retention is not None]
        return MergeResult(
            scale=search.best,
            inside=search.inside,
            tried=list(search.tried.items()),
            merged=_mean(result.merged.value for result in tasks.values()),
            retention=_mean(kept) if kept else None,
            tasks=tasks,
        )

    def _first_grid(self, label: str, history: History) -> Sequence[float]:
        """The probe's own grid at first; afterwards the last best scale and its neighbours."""
        last = next((p.merges[label] for p in reversed(history.probes) if label in p.merges), None)
        if last is None or last.scale <= 0 or len(self.probe.scales) < 2 or self.probe.max_evaluations < 3:
            return self.probe.scales
        grid = sorted(self.probe.scales)
        ratio = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
        return (last.scale / ratio, last.scale, last.scale * ratio)


def task_evaluations(evaluate: Evaluate, peers: Sequence[OpenPeer]) -> dict[str, Evaluate]:
    """The own task's evaluation and those of peers that have one."""
    return {OWN: evaluate} | {peer.label: peer.evaluate for peer in peers if peer.evaluate is not None}


def _long_label(method: MergeMethod) -> str:
    parameters: dict[str, Any] = method.describe()
    name = parameters.pop("method")
    return f"{name}({', '.join(f'{key}={value}' for key, value in parameters.items())})"


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
