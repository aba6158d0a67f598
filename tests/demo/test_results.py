from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergeready.demo.encoder import load_classifier
from mergeready.demo.experts import PreparedTask, TrainedExpert, prepare, train_expert, train_joint
from mergeready.demo.results import DemoResults, Scorer, compile_results
from mergeready.demo.settings import DemoSettings
from mergeready.merging import merge
from mergeready.training.records import Estimate
from tests.demo.tiny import Listening, tiny_base, tiny_task

SETTINGS = DemoSettings(steps=6, batch_size=8, learning_rate=3e-3, probe_first=2, probe_every=4, patience=1)


@dataclasses.dataclass
class World:
    base: Path
    tasks: list[PreparedTask]
    experts: list[TrainedExpert]
    joint: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("demo")
    base = tiny_base(folder / "base")
    tasks = prepare([tiny_task("law", 0), tiny_task("code", 1, classes=4)], base, SETTINGS)
    first = train_expert(tasks[0], [], base, folder / "law", SETTINGS, Listening())
    peers = [(tasks[0], first.picks["ties"])]
    second = train_expert(tasks[1], peers, base, folder / "code", SETTINGS, Listening())
    return World(base, tasks, [first, second], train_joint(tasks, base, folder / "joint", SETTINGS))


@pytest.fixture(scope="module")
def results(world: World) -> DemoResults:
    scorer = Scorer(world.base, world.tasks)
    began = time.perf_counter()
    return compile_results(scorer, world.tasks, world.experts, world.joint, SETTINGS.methods, 6, began)


def accuracy(weights: Path | Mapping[str, Tensor], prepared: PreparedTask, split: str, base: Path) -> Tensor:
    """By example, in a model of its own that loads the weights."""
    model: nn.Module
    if isinstance(weights, Path):
        model = load_classifier(weights)
    else:
        model = load_classifier(base)
        model.bert.load_state_dict(weights)
    model.eval()
    return getattr(prepared, split)(model)["accuracy"].double()


def check(found: Mapping[str, Estimate], weights: object, world: World) -> None:
    assert list(found) == ["law", "code"]
    for prepared in world.tasks:
        right = accuracy(weights, prepared, "test", world.base)  # type: ignore[arg-type]
        assert found[prepared.task.name].value == float(right.mean())
        assert found[prepared.task.name].n == len(right)


def test_base_and_joint(world: World, results: DemoResults) -> None:
    check(results.base, world.base, world)
    assert results.joint is not None
    check(results.joint, world.joint, world)


def test_each_expert_on_its_own_task(world: World, results: DemoResults) -> None:
    for prepared, expert in zip(world.tasks, world.experts, strict=True):
        right = accuracy(expert.end, prepared, "test", world.base)
        assert results.experts[prepared.task.name].value == float(right.mean())


def base_state(world: World) -> dict[str, Tensor]:
    return dict(load_classifier(world.base).bert.state_dict())


@pytest.mark.parametrize("method", SETTINGS.methods)
@pytest.mark.parametrize("place", ["ends", "picks"])
def test_merges_against_merging_by_hand(method: str, place: str, world: World, results: DemoResults) -> None:
    folders = [expert.end if place == "ends" else expert.picks[method] for expert in world.experts]
    found = getattr(results, place)[method]
    state = base_state(world)
    merged = merge(state, folders, method, scale=found.scale, strict=False) if found.scale else state
    check(found.tasks, merged, world)
    assert found.mean.value == pytest.approx(np.mean([task.value for task in found.tasks.values()]))
    assert found.mean.n == sum(task.n for task in found.tasks.values())


@pytest.mark.parametrize("method", SETTINGS.methods)
def test_the_scale_is_the_best_on_validation_data(method: str, world: World, results: DemoResults) -> None:
    folders = [expert.end for expert in world.experts]
    scorer = Scorer(world.base, world.tasks)
    _, search = scorer.merged(folders, method)
    assert search.best == results.ends[method].scale
    assert {0.2, 0.35, 0.6, 1.0} <= set(search.tried)
    for scale, value in search.tried.items():
        merged = merge(base_state(world), folders, method, scale=scale, strict=False)
        means = [float(accuracy(merged, task, "validation", world.base).mean()) for task in world.tasks]
        assert value == pytest.approx(np.mean(means))
    assert search.value == max(search.tried.values())


def test_the_gain_is_paired_over_all_examples(world: World, results: DemoResults) -> None:
    for method in SETTINGS.methods:
        columns = []
        for place, folders in (
            ("picks", [expert.picks[method] for expert in world.experts]),
            ("ends", [expert.end for expert in world.experts]),
        ):
            scale = getattr(results, place)[method].scale
            state = base_state(world)
            merged = merge(state, folders, method, scale=scale, strict=False) if scale else state
            columns.append(torch.cat([accuracy(merged, task, "test", world.base) for task in world.tasks]))
        change = (columns[0] - columns[1]).numpy()
        gain = results.gain[method]
        assert gain.value == pytest.approx(change.mean())
        assert gain.n == len(change)
        draws = np.random.default_rng(1).choice(change, size=(4000, len(change))).mean(1)
        wanted = np.quantile(draws, [0.025, 0.975])
        assert (gain.low, gain.high) == pytest.approx(tuple(wanted), abs=0.035)


def test_the_rest(world: World, results: DemoResults) -> None:
    assert results.steps == 6
    assert results.stopped_at == {expert.task.name: expert.stopped_at for expert in world.experts}
    assert results.pick_steps == {
        method: {expert.task.name: expert.pick_steps[method] for expert in world.experts}
        for method in SETTINGS.methods
    }
    content = results.to_json()
    assert json.loads(json.dumps(content)) == content
    assert content["gain"]["ties"]["value"] == results.gain["ties"].value


def test_seconds_are_those_of_everything(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging and scoring belong to what the demo took."""
    ticking = iter(range(100, 10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticking)))
    began = time.perf_counter()
    scorer = Scorer(world.base, world.tasks)
    ticks: list[float] = []
    original = Scorer.all_tasks

    def slowly(self: Scorer, folder: Path) -> object:
        ticks.extend(time.perf_counter() for _ in range(500))
        return original(self, folder)

    monkeypatch.setattr(Scorer, "all_tasks", slowly)
    found = compile_results(scorer, world.tasks, world.experts, world.joint, ["ties"], 6, began)
    assert found.seconds > 500


def test_without_a_joint_model(world: World) -> None:
    scorer = Scorer(world.base, world.tasks)
    found = compile_results(scorer, world.tasks, world.experts, None, ["ties"], 6, time.perf_counter())
    assert found.joint is None
    assert list(found.ends) == list(found.picks) == list(found.gain) == ["ties"]


def test_the_scorers_model_holds_the_base_again_after_each_merge(world: World) -> None:
    scorer = Scorer(world.base, world.tasks)
    before = {task: score.value for task, score in scorer.base().items()}
    scorer.merged([expert.end for expert in world.experts], "ties")
    scorer.expert(world.experts[0].end, world.tasks[0])
    assert {task: score.value for task, score in scorer.base().items()} == before
