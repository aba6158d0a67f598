"""The same run under every trainer writes the same history, picks the same checkpoints and stops at the same step."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mergeready import Decision, NormBudget, Peer, Probe, Schedule, read_history
from tests import loops
from tests.loops import RUNS, STEPS, batches, load, loader, make_world, optimizer_of
from tests.trainers import Tokens

OTHERS = [name for name in RUNS if name != "plain"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    for name, run in RUNS.items():
        torch.save(run(world, world / name).state_dict(), world / f"{name}.pt")
    return world


@pytest.mark.parametrize("name", OTHERS)
def test_same_history(world: Path, name: str) -> None:
    lines = (world / name / "mergeready/history.jsonl").read_text().splitlines()
    expected = (world / "plain/mergeready/history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in expected]


def test_the_history_is_of_a_run_that_learns(world: Path) -> None:
    history = read_history(world / "plain/mergeready/history.jsonl")
    assert [probe.step for probe in history.probes] == [3, 6, 9, 12]
    assert [record.step for record in history.metrics] == [1, 2, 4, 6, 8, 10, 12]
    assert len({record.norm for record in history.metrics}) == 7
    assert len({probe.merges["ties"].merged for probe in history.probes}) > 1


@pytest.mark.parametrize("name", OTHERS)
def test_same_weights(world: Path, name: str) -> None:
    found, expected = torch.load(world / f"{name}.pt"), torch.load(world / "plain.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_weights_are_those_of_a_run_that_nobody_watches(world: Path) -> None:
    model = load(world)
    optimizer = optimizer_of(model)
    for _, batch in zip(range(STEPS), batches(loader()), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.load(world / "plain.pt")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["lightning", "fabric", "accelerate"])
def test_probes_are_evaluated_in_the_trainers_precision(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the framework's own validation; while task vectors are measured in full precision."""
    seen: dict[str, set[bool]] = {"evaluating": set(), "measuring": set()}
    place, key = {
        "lightning": (loops.pl, "precision"),
        "fabric": (loops, "precision"),
        "accelerate": (loops, "mixed_precision"),
    }[name]
    kind = {"lightning": "Trainer", "fabric": "Fabric", "accelerate": "Accelerator"}[name]
    value = "bf16" if name == "accelerate" else "bf16-mixed"
    monkeypatch.setattr(place, kind, functools.partial(getattr(place, kind), **{key: value}))

    def evaluate(model: Any) -> dict[str, float]:
        handle = model.bert.register_forward_hook(
            lambda *_: seen["evaluating"].add(torch.is_autocast_enabled("cpu"))
        )
        value = -float(model(**Tokens(8)[range(8)]).loss)
        handle.remove()
        return {"score": value}

    def look(*_: Any) -> Decision:
        seen["measuring"].add(torch.is_autocast_enabled("cpu"))
        return Decision(False, "")

    probe = Probe(evaluate=evaluate, scales=(0.5,), max_evaluations=1, schedule=Schedule(every=6))
    peers = [Peer(world / "peer-1", evaluate=evaluate)]
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, of one precision
    try:
        RUNS[name](world, tmp_path, peers=peers, probe=probe, stop=look)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {"evaluating": {True}, "measuring": {False}}


# transformers' Trainer turns `use_cache` off; what is shared beside a pick names its folder, and a plain loop has to
# ask for it.
NOT_COMPARED = ("config.json", "README.md")


@pytest.mark.parametrize("name", OTHERS)
def test_same_picks(world: Path, name: str) -> None:
    """Their bytes too: weights, the index, and the record of the base."""
    files = {
        trainer: {
            path.relative_to(world / trainer): path.read_bytes()
            for path in (world / trainer / "mergeready/picks").rglob("*")
            if path.is_file()
            and path.name not in NOT_COMPARED
            and not re.search("report|fingerprint", path.name)
        }
        for trainer in (name, "plain")
    }
    assert Path("mergeready/picks/picks.json") in files["plain"]
    assert files[name] == files["plain"]


@pytest.mark.parametrize("name", RUNS)
def test_same_stop(world: Path, tmp_path: Path, name: str) -> None:
    norms = [
        (record.step, record.norm)
        for record in read_history(world / "plain/mergeready/history.jsonl").metrics
    ]
    limit = norms[2][1] * 0.999  # passed at the third measurement, step 4
    RUNS[name](world, tmp_path, probe=None, stop=NormBudget(max_norm=limit))
    history = read_history(tmp_path / "mergeready/history.jsonl")
    assert [(decision.step, decision.acted) for decision in history.decisions] == [(4, True)]
    assert history.metrics[-1].step == 4
    summary = json.loads((tmp_path / "mergeready/summary.json").read_text())
    assert summary["stopped"][0]["step"] == 4


@pytest.mark.parametrize("name", RUNS)
def test_record_only_goes_on(world: Path, tmp_path: Path, name: str) -> None:
    RUNS[name](world, tmp_path, probe=None, stop=NormBudget(max_norm=1e-9), on_stop="record")
    history = read_history(tmp_path / "mergeready/history.jsonl")
    assert [(decision.step, decision.acted) for decision in history.decisions] == [(1, False)]
    assert history.metrics[-1].step == 12


TECHNIQUES = {
    "drift_penalty": [{"drift_penalty": {"strength": 0.05}}],
    "sharpness_aware": [{"sharpness_aware": {"radius": 0.05, "every": 2}}],
    "several": [{"simulated_merge": {"every": 2}}, "weight_average", {"norm_governor": {"max_norm": 0.4}}],
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_acts_alike_under_every_trainer(world: Path, tmp_path: Path, technique: str) -> None:
    changes: dict[str, Any] = {"probe": None, "techniques": TECHNIQUES[technique]}
    weights = {n: run(world, tmp_path / n, **changes).state_dict() for n, run in RUNS.items()}
    lines = {n: (tmp_path / n / "mergeready/history.jsonl").read_text() for n in RUNS}
    for name in OTHERS:
        assert lines[name] == lines["plain"]
        assert all(torch.equal(value, weights[name][key]) for key, value in weights["plain"].items())
    without = torch.load(world / "plain.pt")
    assert not all(torch.equal(value, without[key]) for key, value in weights["plain"].items())
