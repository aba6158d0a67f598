"""Recipes that are run: in small, whole and in parts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from mergeready import read_history
from mergeready.errors import OptionError, OutputExistsError
from mergeready.recipes import parse_recipe, read_recipe
from mergeready.recipes.classes import Classes
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.result import RunResult, read_result
from mergeready.recipes.resume import claim, newest_checkpoint
from mergeready.recipes.run import Run, prepare, run_recipe
from mergeready.recipes.team import run_team
from mergeready.training.techniques.registry import make_technique

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


def content(folder: Path, **optimisation: Any) -> dict[str, Any]:
    return {
        "model": "mergeready.recipes.tiny:text",
        "data": {
            "name": "mergeready.demo.samples:texts",
            "with": {"task": "udhr"},
            "limit": {"train": 32, "validation": 8, "test": 8},
        },
        "task": {"kind": "text-classification", "max_tokens": 16},
        "optimisation": {
            "learning_rate": 1e-3,
            "steps": 6,
            "batch_size": 4,
            "save_every": 2,
            "device": "cpu",
            "schedule": "constant",
            **optimisation,
        },
        "mergeready": {
            "probe": {"merge": ["ties"], "max_evaluations": 3, "schedule": {"every": 3, "geometric": False}},
            "measure": {"every": 2},
        },
        "output": str(folder),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "expert" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, run_recipe(parse_recipe(content(folder)))


def test_a_run_leaves_its_expert_history_picks_and_result(whole: tuple[Path, RunResult]) -> None:
    folder, result = whole
    assert (result.metric, result.steps, result.stopped) == ("accuracy", 6, None)
    assert set(result.scores) == {"validation", "test"}
    assert [probe.step for probe in read_history(folder / "mergeready/history.jsonl").probes] == [3, 6]
    assert all((folder / place).is_dir() for place in result.picks.values())
    assert {"expert-best", "merge-best"} <= set(result.picks)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["optimisation"]["steps"] == 6


def test_a_run_that_is_over_is_not_run_again(whole: tuple[Path, RunResult]) -> None:
    folder, result = whole
    before = (folder / "expert/model.safetensors").stat().st_mtime_ns
    assert run_recipe(parse_recipe(content(folder))) == result
    assert (folder / "expert/model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_recipe_is_refused(whole: tuple[Path, RunResult], tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"`optimisation.clip`, `optimisation.seed` changed"):
        run_recipe(parse_recipe(content(whole[0], seed=3, clip=2.0)))
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="holds no run of a recipe"):
        run_recipe(parse_recipe(content(tmp_path)))


def test_a_recipe_that_was_refused_does_not_stand_in_the_way_of_the_corrected_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="finds no parameter"):
        run_recipe(parse_recipe(content(tmp_path / "run", freeze=["nothing"])))
    assert claim(parse_recipe(content(tmp_path / "run"))) == tmp_path / "run"
    assert "nothing" not in (tmp_path / "run" / "recipe.yaml").read_text()


def test_what_is_left_of_a_recipe_while_it_was_written_does_not_stand_in_the_way(tmp_path: Path) -> None:
    recipe = parse_recipe(content(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.recipe.yaml.partial-0123abcd").write_text("task:")
    assert claim(recipe) == tmp_path / "run"
    assert claim(recipe) == tmp_path / "run"


def test_processes_of_a_job_claim_one_folder_in_the_same_moment(tmp_path: Path) -> None:
    for trial in range(20):
        recipe = parse_recipe(content(tmp_path / f"run-{trial}"))
        start = Barrier(3)

        def one(recipe: Recipe = recipe, start: Barrier = start) -> Path:
            start.wait()
            return claim(recipe)

        with ThreadPoolExecutor(3) as pool:
            claims = [pool.submit(one) for _ in range(3)]
        assert {done.result() for done in claims} == {tmp_path / f"run-{trial}"}
        assert [path.name for path in (tmp_path / f"run-{trial}").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("on_stop", ["stop", "record"])
def test_the_result_says_why_a_run_was_stopped_and_only_if_it_was(tmp_path: Path, on_stop: str) -> None:
    given = content(tmp_path / "run", learning_rate=1e-12)
    given["mergeready"]["stop"] = {"expert_plateau": {"patience": 1}}
    given["mergeready"]["on_stop"] = on_stop
    given["mergeready"]["probe"]["schedule"]["every"] = 2
    result = run_recipe(parse_recipe(given))
    history = read_history(tmp_path / "run/mergeready/history.jsonl")
    assert [decision.step for decision in history.decisions] == [4]
    if on_stop == "record":
        assert (result.steps, result.stopped) == (6, None)
        return
    assert (result.steps, result.stopped) == (4, history.decisions[0].reason)
    # Killed after its last checkpoint, before its end was written.
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/mergeready/summary.json").unlink()
    assert run_recipe(parse_recipe(given)) == result


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    whole: tuple[Path, RunResult], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content(tmp_path / "parts")))
    kill = (
        "import os, signal; from transformers import TrainerCallback as T; from mergeready.recipes import read_recipe\n"
        "import mergeready.recipes.run as r\n"
        "class Kill(T):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "recipe = read_recipe('run.yaml'); r.claim(recipe); run = r.Run(recipe, r.prepare(recipe))\n"
        "run.prepared.trainer.add_callback(Kill()); run.train()\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", kill],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )  # as many threads as tests have: sums depend on their number
    assert died.returncode == -signal.SIGKILL
    # A checkpoint whose writing was cut short is passed over.
    broken = tmp_path / "parts" / "checkpoint-5"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 5, ')
    result = run_recipe(parse_recipe(content(tmp_path / "parts")))
    folder, expected = whole
    assert result == expected
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name
    histories = [path / "mergeready/history.jsonl" for path in (folder, tmp_path / "parts")]
    assert histories[0].read_bytes() == histories[1].read_bytes()


def test_what_a_function_draws_is_drawn_with_the_seed(tmp_path: Path) -> None:
    given = content(tmp_path / "run", freeze=["bert"])
    given["model"] = {"name": "tests.recipes.score:model", "processor": "mergeready.recipes.tiny:text"}
    states = []
    for _ in range(2):
        torch.rand(3)
        states.append(prepare(parse_recipe(given)).trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_adapters_of_a_team_start_alike_whatever_their_heads_are(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    drawn = []
    for task in ("udhr", "emoji_name"):
        given = content(tmp_path / task)
        given["data"]["with"] = {"task": task}
        given["task"]["lora"] = {"rank": 2, "targets": ["query"]}
        state = prepare(parse_recipe(given)).trainer.model.state_dict()
        drawn.append({name: value for name, value in state.items() if "lora_A" in name})
    assert drawn[0]
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_counted_as_the_trainer_counts(tmp_path: Path, accumulate: int) -> None:
    given = content(tmp_path / "run", batch_size=6, accumulate=accumulate, save_every=None)
    given["optimisation"] = {k: v for k, v in given["optimisation"].items() if k != "steps"} | {"epochs": 1.5}
    given["mergeready"] = {"probe": False, "picks": False}
    run = Run(parse_recipe(given), prepare(parse_recipe(given)))
    counted = run.total_steps
    run.train()
    assert run.prepared.trainer.state.global_step == counted == {1: 9, 2: 5}[accumulate]


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """One step of 8 examples at once is one step of 4 times 2: loss and gradient are means over all of them."""
    norms = []
    for size, parts in ((8, 1), (2, 4)):
        changes = {"batch_size": size, "accumulate": parts, "steps": 1, "log_every": 1}
        recipe = parse_recipe(content(tmp_path / f"{parts}", **changes))
        trainer = prepare(recipe).trainer
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_in_joint_training_only_classes_of_the_own_task_compete() -> None:
    classes = Classes(("a", "b", "c", "d", "e"), (0, 0, 1, 1, 1), ("x", "y"))
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([1, 2, 4])
    by_hand = [
        cross_entropy(logits[0, :2].float(), torch.tensor(1)),
        cross_entropy(logits[1, 2:].float(), torch.tensor(0)),
        cross_entropy(logits[2, 2:].float(), torch.tensor(2)),
    ]
    loss = classes.loss()({"logits": logits}, labels, num_items_in_batch=torch.tensor(6))
    assert float(loss) == pytest.approx(float(sum(by_hand)) / 6, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no_such_module_here:f"}, "`model` names no_such_module_here:f, but No module named"),
        ({"model": "mergeready.recipes.tiny:nothing"}, "has no nothing"),
        ({"model": "mergeready.demo.samples:texts"}, "`model`: .* is called with no arguments"),
        ({"data": {"files": {"train": "missing.csv"}}}, "what is not there: missing.csv"),
        ({"data": {"name": "mergeready.demo.samples:texts", "with": {"task": "x"}}}, "no task 'x'"),
        (
            {"task": {"kind": "text-classification", "label": "class"}},
            "names class, but the train data has",
        ),
        ({"evaluation": "bleu"}, "`evaluation` must be one of accuracy, loss"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prepare(parse_recipe(content(tmp_path / "run") | changes))


def test_files_and_a_python_evaluation(tmp_path: Path) -> None:
    rows = "".join(f"{'good' if i % 2 else 'bad'} thing {i},{'yes' if i % 2 else 'no'}\n" for i in range(20))
    (tmp_path / "all.csv").write_text("text,label\n" + rows)
    given = content(tmp_path / "run", steps=1)
    given["data"] = {"files": {"train": str(tmp_path / "all.csv")}, "holdout": 0.25}
    given["mergeready"] = {"probe": False}
    given["evaluation"] = {"name": "tests.recipes.score:constant", "with": {"value": 0.5}}
    prepared = prepare(parse_recipe(given))
    assert len(prepared.trainer.train_dataset) == 15
    assert prepared.evaluations["validation"](prepared.trainer.model) == {"score": 0.5, "examples": 5.0}
    assert prepared.trainer.model.config.id2label == {0: "no", 1: "yes"}


def test_data_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"text": "a"')
    for suffix in ("csv", "tsv"):
        (tmp_path / f"rows.{suffix}").write_text("text,label\na,b\n")
    both = {"train": str(tmp_path / "rows.csv"), "test": str(tmp_path / "rows.tsv")}
    with pytest.raises(OptionError, match="must all be csv, tsv, json"):
        prepare(parse_recipe(content(tmp_path / "run") | {"data": {"files": both}}))
    for place, message in (("empty", "is a folder that cannot be loaded"), ("broken.json", "as json")):
        given = content(tmp_path / "run") | {"data": str(tmp_path / place)}
        with pytest.raises(OptionError, match=f"{place}.*{message}"):
            prepare(parse_recipe(given))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("exchange", ["experts", "fingerprints"])
def test_a_team_trains_in_rounds_and_resumes(tmp_path: Path, exchange: str, trained: str) -> None:
    given = content(tmp_path / "team", steps=4)
    name = "model.safetensors"
    if trained == "lora":
        pytest.importorskip("peft")
        given["task"]["lora"] = {"rank": 2, "targets": ["query", "value"]}
        name = "adapter_model.safetensors"
    given["team"] = {
        "members": {
            "a": {"data": {"with": {"task": "udhr"}}},
            "b": {"data": {"with": {"task": "emoji_name"}}},
        },
        "rounds": 2,
        "exchange": exchange,
        "merge": ["average"],
    }
    recipe = parse_recipe(given)
    result = run_team(recipe)
    assert set(result.merged["average"]) == {"a", "b", "mean"}
    history = read_history(tmp_path / "team/a/mergeready/history.jsonl")
    last = history.metrics[-1]
    assert last.step == 4
    assert set(last.cosine) == {"b"}, "in the second round, members are measured against each other"
    assert not history.metrics[0].cosine
    suffix = "" if exchange == "experts" else ".fingerprint.safetensors"
    assert (tmp_path / f"team/shown/round-1/a{suffix}").exists()
    # Without its result the team only merges again.
    before = (tmp_path / "team/a/expert" / name).stat().st_mtime_ns
    (tmp_path / "team/result.json").unlink()
    assert run_team(recipe) == result
    assert (tmp_path / "team/a/expert" / name).stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_papers_protocol_lowers_the_rate_on_a_plateau_and_stops_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flat = ["optimisation.steps=12", "optimisation.learning_rate=1e-12"]
    recipe = read_recipe(ROOT / "recipes/paper/protocol.yaml", flat, quick=True)
    run_team(recipe)
    for name in ("letter", "face"):
        found = read_result(tmp_path / recipe.output / name)
        # Probes at 2, 4, … : 4 and 6 are the first plateau, 8 and 10 the second, in the team's second round.
        assert found.steps == 10
        assert found.stopped == "expert metric: plateau 2, after 1 lower learning rates"
        state = newest_checkpoint(tmp_path / recipe.output / name)
        log = json.loads((state / "trainer_state.json").read_text())["log_history"]  # type: ignore[operator]
        factors = {e["step"]: e[FACTOR] for e in log if FACTOR in e}
        # A factor is logged with the step that it held for; step 7 is the first of the second round.
        assert factors[6] == 1.0
        assert factors[8] == pytest.approx(0.1)


FACTOR = "mergeready/plateau_schedule/factor"


def test_the_papers_baseline_is_the_command_that_its_readme_gives() -> None:
    text = (ROOT / "recipes/paper/README.md").read_text()
    command = next(block for block in text.split("```") if "cosine" in block and "mergeready train" in block)
    words = shlex.split(command.removeprefix("console").replace("\\\n", " "))
    changes = [value for option, value in pairwise(words) if option == "--set"]
    recipe = read_recipe(ROOT / words[2], changes)
    assert (recipe.optimisation.schedule, recipe.mergeready.techniques) == ("cosine", [])
    assert recipe.mergeready.on_stop == "record"
    [technique] = read_recipe(ROOT / words[2]).mergeready.techniques
    assert make_technique(technique) == recipe.mergeready.stop.plateau_schedule


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_runs_in_its_quick_version(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(path, quick=True)
    if recipe.task.kind == "causal-lm":
        pytest.importorskip("trl", reason="the trl extra brings it")
    result = run_team(recipe) if recipe.team else run_recipe(recipe)
    assert result.steps == 4
    assert result.scores
    assert (tmp_path / recipe.output / "result.json").is_file()
