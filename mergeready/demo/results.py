from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergeready.demo.encoder import ZeroShotClassifier, load_classifier
from mergeready.demo.experts import PreparedTask, TrainedExpert
from mergeready.merging.evaluation import Score, run_evaluation
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.scale_search import ScaleSearch, search_scale
from mergeready.training.bootstrap import difference, estimate
from mergeready.training.records import Estimate

_SCALES = (0.2, 0.35, 0.6, 1.0)
_METRIC = "accuracy"


@dataclass(frozen=True)
class MergedScores:
    """One merge: test accuracy by task, and the scale that validation data chose."""

    tasks: Mapping[str, Estimate]
    mean: Estimate
    scale: float
    inside: bool


@dataclass(frozen=True)
class DemoResults:
    """The final table. All accuracies are on test data; scales were chosen on validation data.

    Attributes:
        base: Task to the zero-shot accuracy of the base.
        experts: Task to the accuracy of its expert after all steps.
        ends: Merge method to the merge of the experts after all steps.
        picks: Merge method to the merge of the picked checkpoints.
        gain: Merge method to mean accuracy of the merged picks minus that of the merged ends.
        joint: Task to the accuracy of one model trained on all tasks, if that was asked for.
        steps: Steps of a full run.
        stopped_at: Task to the step where the callback stopped the run, or None.
        pick_steps: Merge method to task to the step of the pick.
        seconds: Wall time of the whole demo.
    """

    base: Mapping[str, Estimate]
    experts: Mapping[str, Estimate]
    ends: Mapping[str, MergedScores]
    picks: Mapping[str, MergedScores]
    gain: Mapping[str, Estimate]
    joint: Mapping[str, Estimate] | None
    steps: int
    stopped_at: Mapping[str, int | None]
    pick_steps: Mapping[str, Mapping[str, int]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


class Scorer:
    """Evaluates bases, experts and merges of the demo in one model that holds the base.

    Args:
        base: The encoder's folder.
        tasks: The prepared tasks.
    """

    def __init__(self, base: Path, tasks: Sequence[PreparedTask]) -> None:
        self._base, self._tasks = base, tasks
        self._model: ZeroShotClassifier = load_classifier(base)

    def base(self) -> dict[str, Score]:
        """Test scores of the base."""
        return self._test()

    def expert(self, folder: Path, task: PreparedTask) -> Score:
        """Test score of one expert on its task."""
        with MergedInPlace(self._model, self._base, [folder], include_model=False):
            return run_evaluation(task.test, self._model, _METRIC, task.task.name)

    def all_tasks(self, folder: Path) -> dict[str, Score]:
        """Test scores of one model on all tasks."""
        with MergedInPlace(self._model, self._base, [folder], include_model=False):
            return self._test()

    def merged(self, folders: Sequence[Path], method: str) -> tuple[dict[str, Score], ScaleSearch]:
        """Test scores of a merge at the scale that is best on validation data."""
        at_base = self._validation_mean()
        with MergedInPlace(self._model, self._base, list(folders), method, include_model=False) as merge:

            def mean_at(scale: float) -> float:
                merge.set_scale(scale)
                return self._validation_mean()

            search = search_scale(mean_at, _SCALES, base_value=at_base, max_evaluations=10)
            merge.set_scale(search.best)
            return self._test(), search

    def _test(self) -> dict[str, Score]:
        return {
            task.task.name: run_evaluation(task.test, self._model, _METRIC, task.task.name)
            for task in self._tasks
        }

    def _validation_mean(self) -> float:
        scores = [run_evaluation(t.validation, self._model, _METRIC, t.task.name) for t in self._tasks]
        return float(np.mean([score.value for score in scores]))


def compile_results(
    scorer: Scorer,
    tasks: Sequence[PreparedTask],
    experts: Sequence[TrainedExpert],
    joint: Path | None,
    methods: Sequence[str],
    steps: int,
    began: float,
) -> DemoResults:
    """Merge ends and picks with every method and put all test scores together.

    ``began`` is the ``time.perf_counter`` at which the demo started.
    """
    ends, picks, gain = {}, {}, {}
    for method in methods:
        end_scores, end_search = scorer.merged([expert.end for expert in experts], method)
        pick_scores, pick_search = scorer.merged([expert.picks[method] for expert in experts], method)
        ends[method] = _merged_scores(end_scores, end_search)
        picks[method] = _merged_scores(pick_scores, pick_search)
        gain[method] = difference(_pooled(pick_scores), _pooled(end_scores))
    return DemoResults(
        base=_estimates(scorer.base()),
        experts={e.task.name: estimate(scorer.expert(e.end, t)) for e, t in zip(experts, tasks, strict=True)},
        ends=ends,
        picks=picks,
        gain=gain,
        joint=None if joint is None else _estimates(scorer.all_tasks(joint)),
        steps=steps,
        stopped_at={expert.task.name: expert.stopped_at for expert in experts},
        pick_steps={method: {e.task.name: e.pick_steps[method] for e in experts} for method in methods},
        seconds=time.perf_counter() - began,
    )


def _merged_scores(scores: Mapping[str, Score], search: ScaleSearch) -> MergedScores:
    return MergedScores(_estimates(scores), estimate(_pooled(scores)), search.best, search.inside)


def _estimates(scores: Mapping[str, Score]) -> dict[str, Estimate]:
    return {task: estimate(score) for task, score in scores.items()}


def _pooled(scores: Mapping[str, Score]) -> Score:
    """All tasks' examples together; test splits are of one size, so this is the mean over tasks."""
    examples = np.concatenate([score.examples for score in scores.values() if score.examples is not None])
    return Score(float(np.mean([score.value for score in scores.values()])), examples)
