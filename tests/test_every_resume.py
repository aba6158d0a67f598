"""A run that crashes and is resumed under any trainer ends as one that was never interrupted, bit by bit.

The transformers Trainer has its own tests of this in test_transformers.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from mergeready import Picks, Probe, Schedule, read_history
from mergeready.errors import HistoryError
from tests import loops
from tests.loops import RUNS, Crash, Saving, make_world
from tests.models import tiny_bert
from tests.ranks import exit_code
from tests.trainers import right_or_wrong

NAMES = [name for name in RUNS if name != "transformers"]
HISTORY = "mergeready/history.jsonl"
PARETO: dict[str, Any] = {"picks": Picks(pareto=2)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    weights = RUNS["plain"](world, world / "whole", Saving(every=4), **PARETO).state_dict()
    torch.save(weights, world / "whole.pt")
    return world


def files(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.json"
    }


@pytest.mark.parametrize("name", NAMES)
def test_crashed_and_resumed_equals_uninterrupted(world: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(Crash):
        RUNS[name](world, tmp_path, Saving(every=4, crash=11), **PARETO)
    assert read_history(tmp_path / HISTORY)[-1].step == 10
    model = RUNS[name](world, tmp_path, Saving(every=4, resume=True), **PARETO)
    expected = torch.load(world / "whole.pt")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    ours, whole = tmp_path / "mergeready", world / "whole/mergeready"
    assert (ours / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    assert files(ours / "picks") == files(whole / "picks")


@pytest.mark.parametrize("name", NAMES)
def test_changed_peers_and_methods_on_resume_are_recorded(world: Path, tmp_path: Path, name: str) -> None:
    RUNS[name](world, tmp_path, Saving(every=8))
    probe = Probe(merge="average", evaluate=right_or_wrong(), schedule=Schedule(every=3))
    RUNS[name](world, tmp_path, Saving(resume=True), peers=[world / "peer-1"], probe=probe)
    history = read_history(tmp_path / HISTORY)
    [changed] = [record for record in history if record.kind == "resume"]
    assert changed.step == 8
    assert set(changed.changed) == {"peers", "methods"}
    assert [set(probe.merges) for probe in history.probes if probe.step > 8] == [{"average"}] * 2


@pytest.mark.parametrize("name", NAMES)
def test_resume_without_a_given_base_finds_the_snapshot(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On resume the model holds trained weights before any event: they must not be taken for the base."""

    def nameless(folder: Path) -> Any:
        model = BertForSequenceClassification.from_pretrained(folder / "base").train()
        model.config._name_or_path = ""  # else the folder it was loaded from would be found again
        return model

    monkeypatch.setattr(loops, "load", nameless)
    changes: dict[str, Any] = {"base": None, "probe": None}
    with pytest.raises(Crash):
        RUNS[name](world, tmp_path, Saving(every=4, crash=11), **changes)
    assert (tmp_path / "mergeready/base").is_dir()
    RUNS[name](world, tmp_path, Saving(resume=True), **changes)
    norms = {record.step: record.norm for record in read_history(tmp_path / HISTORY).metrics}
    assert norms == {record.step: record.norm for record in read_history(world / "whole" / HISTORY).metrics}


@pytest.mark.parametrize("name", NAMES)
def test_resume_without_any_base_is_refused(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Crash):
        RUNS[name](world, tmp_path, Saving(every=4, crash=11), probe=None)
    other = make_world(tmp_path / "other")
    monkeypatch.setattr(loops, "load", lambda folder: tiny_bert())
    with pytest.raises(HistoryError, match="Pass `base`"):
        RUNS[name](other, tmp_path, Saving(resume=True), base=None, probe=None)


def killed(name: str, world: Path, folder: Path, at: int) -> None:
    saving = Saving(every=4, crash=at, die=lambda: os.kill(os.getpid(), signal.SIGKILL))
    RUNS[name](world, folder, saving, **PARETO)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"), [("accelerate", 6), ("accelerate", 9), ("lightning", 9), ("plain", 7)]
)
def test_killed_and_resumed_equals_uninterrupted(world: Path, tmp_path: Path, name: str, at: int) -> None:
    assert exit_code(killed, name, world, tmp_path, at) == -signal.SIGKILL
    RUNS[name](world, tmp_path, Saving(every=4, resume=True), **PARETO)
    ours, whole = tmp_path / "mergeready", world / "whole/mergeready"
    assert (ours / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    assert files(ours / "picks") == files(whole / "picks")


@pytest.mark.parametrize("name", NAMES)
def test_techniques_go_on_where_they_were(world: Path, tmp_path: Path, name: str) -> None:
    """An average has tensors of its own; simulated merges have to draw the same again."""
    changes: dict[str, Any] = {
        "probe": None,
        "techniques": [{"weight_average": {"decay": 0.5}}, {"simulated_merge": {"every": 3}}],
    }
    whole = RUNS[name](world, tmp_path / "whole", Saving(every=4), **changes).state_dict()
    with pytest.raises(Crash):
        RUNS[name](world, tmp_path / "parts", Saving(every=4, crash=11), **changes)
    parts = RUNS[name](world, tmp_path / "parts", Saving(every=4, resume=True), **changes).state_dict()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    lines = [(tmp_path / n / HISTORY).read_bytes() for n in ("whole", "parts")]
    assert lines[0] == lines[1]
