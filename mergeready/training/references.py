from __future__ import annotations

from collections.abc import Sequence

from mergeready.experts.live import LiveExpert
from mergeready.merging.evaluation import (
    Evaluate,
    Score,
    call_evaluation,
    choose_metric,
    run_evaluation,
    take_score,
)
from mergeready.merging.in_place import MergedInPlace
from mergeready.training.peers import OpenPeer
from mergeready.training.probe import OWN, task_evaluations


def measure_references(
    live: LiveExpert, peers: Sequence[OpenPeer], evaluate: Evaluate, metric: str | None
) -> tuple[dict[str, dict[str, Score]], str]:
    """What merged results are compared with: the base on every task, and each peer on its own.

    Evaluated in the live model, which is as before afterwards; this also tries every evaluation function before
    training time is spent.

    Returns:
        Scores by task: ``base`` and, for a peer's task, ``expert``. And the name of the metric.

    Raises:
        EvaluationError: If an evaluation fails.
    """
    tasks = task_evaluations(evaluate, peers)
    with MergedInPlace(live, None, [], include_model=False):
        results = {task: call_evaluation(function, live.model, task) for task, function in tasks.items()}
    name = choose_metric(results[OWN], metric, OWN)
    found = {task: {"base": take_score(result, name, task)} for task, result in results.items()}
    for peer in peers:
        if peer.evaluate is not None:
            with MergedInPlace(live, None, [peer], include_model=False):
                found[peer.label]["expert"] = run_evaluation(peer.evaluate, live.model, name, peer.label)
    return found, name
