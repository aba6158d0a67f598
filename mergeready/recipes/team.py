"""A team: several experts that are meant to be merged, in rounds, each measured against what the others showed."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.fingerprint import SUFFIX
from mergeready.experts.live import LiveExpert
from mergeready.merging.evaluation import is_greater_better, run_evaluation
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.scale_search import search_scale
from mergeready.merging.tune import FIRST_SCALES, MAX_EVALUATIONS
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.recipes.recipe import Recipe, member_recipe
from mergeready.recipes.result import RESULT_NAME, RunResult, read_result, write_result
from mergeready.recipes.resume import claim
from mergeready.recipes.run import EXPERT_NAME, Run, prepare
from mergeready.recipes.team_settings import TeamSettings
from mergeready.training.peers import Peer
from mergeready.training.save import save_expert
from mergeready.training.settings import merge_method
from mergeready.weights.atomic import new_folder
from mergeready.weights.ranks import Ranks

SHOWN_NAME = "shown"


def run_team(recipe: Recipe) -> RunResult:
    """Train all members of a team in rounds, then merge them.

    Members train one after the other in this process. The team's folder then holds a run of each member,
    ``shown/`` with what they exchanged, and ``result.json``.

    Raises:
        MergeReadyError: As :func:`~mergeready.recipes.run.run_recipe` does.
        OptionError: If there is no base that members could be merged on.
        UnsupportedError: In a job of several processes.
    """
    # torchrun says so before any process group is there, which only a Trainer would make.
    if max(Ranks.world().size, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UnsupportedError(
            "members of a team train one after the other in one process; leave torchrun out, or train each member by "
            "itself."
        )
    team = recipe.team
    if team is None:
        raise UnsupportedError("the recipe has no `team`.")
    folder = claim(recipe)
    if (folder / RESULT_NAME).is_file():
        return read_result(folder)
    members = {name: member_recipe(recipe, name) for name in team.members}
    for member in members.values():
        claim(member)
    for number in range(1, team.rounds + 1):
        for name, member in members.items():
            if not shown(folder, number, name, team).exists():
                _play(folder, number, name, member, team)
    runs = {name: Run(member, prepare(member)) for name, member in members.items()}
    results = {}
    for name, run in runs.items():
        run.train()
        results[name] = run.finish()
    result = _merged(team, runs, results)
    write_result(folder, result)
    return result


def shown(folder: Path, number: int, name: str, team: TeamSettings) -> Path:
    """What a member shows after a round: a fingerprint, or its weights."""
    place = folder / SHOWN_NAME / f"round-{number}"
    return place / (f"{name}{SUFFIX}" if team.exchange == "fingerprints" else name)


def _play(folder: Path, number: int, name: str, member: Recipe, team: TeamSettings) -> None:
    """One member's part of one round."""
    run = Run(member, prepare(member))
    is_adapter_of_lm = member.task.kind == "causal-lm" and member.task.lora is not None
    if run.base is None and not is_adapter_of_lm:
        raise OptionError(
            "a function made the model, and members of a team are merged on the base that they share: say with "
            "`mergeready.base` where it is."
        )
    others = [] if number == 1 else [other for other in team.members if other != name]
    peers = [Peer(str(shown(folder, number - 1, other, team)), name=other) for other in others]
    run.train(until=round(run.total_steps * number / team.rounds), peers=peers)
    place = shown(folder, number, name, team)
    if team.exchange == "experts":
        with new_folder(place) as temporary:
            save_expert(run.prepared.trainer.model, temporary, run.prepared.processor)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    live = LiveExpert(run.prepared.trainer.model, run.base)
    with live.readable():
        take_fingerprint(live.vector, live.base, label=name).save(place)


def _merged(team: TeamSettings, runs: dict[str, Run], results: dict[str, RunResult]) -> RunResult:
    """All members merged by each method, at the scale that is best on validation data; values on test data."""
    metric = next(iter(results.values())).metric
    if metric is None:
        raise UnsupportedError("a team needs an `evaluation`.")
    probe = next(iter(runs.values())).recipe.mergeready.probe
    is_greater = is_greater_better(metric, probe.greater_is_better if probe else None)
    split = "test" if all("test" in result.scores for result in results.values()) else "validation"
    merged: dict[str, dict[str, float]] = {}
    scales: dict[str, float] = {}
    for given in team.merge:
        method = merge_method(given)
        with ExitStack() as stack:
            places = {}
            for name, run in runs.items():
                # Each member's model carries its own head; everything that the base has is merged.
                experts = [str(other.folder / EXPERT_NAME) for other in runs.values()]
                place = MergedInPlace(
                    run.prepared.trainer.model, run.base, experts, method, include_model=False, scale=0.0
                )
                places[name] = stack.enter_context(place)

            def values(
                scale: float, part: str, places: dict[str, MergedInPlace] = places
            ) -> dict[str, float]:
                found = {}
                for name, place in places.items():
                    place.set_scale(scale)
                    evaluate = runs[name].prepared.evaluations[part]
                    # Where a model overflows, the search has to go on.
                    score = run_evaluation(evaluate, place.live.model, metric, name, finite=False)
                    found[name] = score.value
                return found

            def mean_at(scale: float) -> float:
                return _mean(values(scale, "validation"))

            search = search_scale(
                mean_at,
                FIRST_SCALES,
                greater_is_better=is_greater,
                base_value=mean_at(0.0),
                max_evaluations=MAX_EVALUATIONS,
            )
            merged[method.name] = values(search.best, split)
            scales[method.name] = search.best
    alone = {name: result.scores[split] for name, result in results.items()}
    return RunResult(
        metric=metric,
        scores={**alone, "mean": _mean(alone)},
        steps=max(result.steps for result in results.values()),
        merged={method: {**found, "mean": _mean(found)} for method, found in merged.items()},
        scales=scales,
    )


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
