from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergeready import MergeReadyLoop, NormBudget, Picks, Probe, Schedule
from mergeready.errors import HistoryError, OptionError

EVERY_STEP = Schedule(every=1)


def linear() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    return model


def advance(model: nn.Module) -> None:
    """One step that moves each of the two weights by 3 and 4: ‖τ‖ grows by 5."""
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, 4.0]])


def test_a_run(tmp_path: Path) -> None:
    model = linear()
    monitor = MergeReadyLoop(tmp_path, measure=EVERY_STEP, stop=NormBudget(max_norm=9.0))
    monitor.prepare(model)
    advance(model)
    assert monitor.step()["mergeready/norm"] == pytest.approx(5.0)
    assert not monitor.should_stop
    advance(model)
    assert monitor.step()["mergeready/norm"] == pytest.approx(10.0)
    assert monitor.should_stop
    assert monitor.steps == 2
    assert monitor.finish()["stopped"][0]["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"base", "history.jsonl", "summary.json"}


def test_steps_without_a_measurement_return_nothing(tmp_path: Path) -> None:
    model = linear()
    monitor = MergeReadyLoop(tmp_path, measure=Schedule(every=3, geometric=False))
    monitor.prepare(model, total_steps=4)
    found = []
    for _ in range(4):
        advance(model)
        found.append(bool(monitor.step()))
    assert found == [False, False, True, True]  # every third, and the last


def test_the_request_to_stop_stays(tmp_path: Path) -> None:
    """A loop may look at it only now and then."""
    model = linear()
    stop = NormBudget(max_norm=4.0)
    monitor = MergeReadyLoop(tmp_path, measure=Schedule(every=2), stop=stop)
    monitor.prepare(model)
    for expected in (True, True, True):
        advance(model)
        monitor.step()
        assert monitor.should_stop is expected


def test_the_state_is_json(tmp_path: Path) -> None:
    model = linear()
    monitor = MergeReadyLoop(tmp_path, measure=EVERY_STEP)
    monitor.prepare(model)
    advance(model)
    monitor.step()
    state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
    again = MergeReadyLoop(tmp_path, measure=EVERY_STEP)
    again.load_state_dict(state)
    again.prepare(model)
    assert again.steps == 1
    assert list(again.history) == list(monitor.history)


def test_a_saved_state_does_not_grow_with_the_run(tmp_path: Path) -> None:
    model = linear()
    monitor = MergeReadyLoop(tmp_path, measure=EVERY_STEP)
    monitor.prepare(model)
    state = monitor.state_dict()
    advance(model)
    monitor.step()
    assert len(state["history"]) == 1
    assert len(monitor.state_dict()["history"]) == 2


def test_picks_go_only_once_the_checkpoint_that_replaces_them_is_complete(tmp_path: Path) -> None:
    """A run that is killed while it saves is resumed from the checkpoint before, which refers to older picks."""
    model = linear()
    values = itertools.count()
    probe = Probe(
        evaluate=lambda model: {"score": float(next(values))},  # each step is better than the last
        schedule=EVERY_STEP,
        scales=(1.0,),
        max_evaluations=1,
    )
    peer = {"weight": torch.tensor([[1.0, 2.0]])}
    monitor = MergeReadyLoop(tmp_path, peers=[peer], probe=probe, picks=Picks(merge_best=False))
    folders = lambda: {path.name for path in (tmp_path / "picks").iterdir() if path.is_dir()}  # noqa: E731
    monitor.prepare(model)
    for _ in range(2):
        advance(model)
        monitor.step()
    assert folders() == {"step-000001", "step-000002"}
    monitor.state_dict()
    assert folders() == {"step-000001", "step-000002"}
    advance(model)
    monitor.step()
    assert folders() == {"step-000002", "step-000003"}


class TestWrongOrder:
    @pytest.mark.parametrize("call", ["step", "finish", "state_dict"])
    def test_before_prepare(self, tmp_path: Path, call: str) -> None:
        with pytest.raises(OptionError, match=r"`prepare\(model\)` first"):
            getattr(MergeReadyLoop(tmp_path), call)()

    def test_loading_after_prepare(self, tmp_path: Path) -> None:
        monitor = MergeReadyLoop(tmp_path)
        monitor.prepare(linear())
        with pytest.raises(OptionError, match=r"before `prepare\(model\)`"):
            monitor.load_state_dict(monitor.state_dict())


class TestBadState:
    def state(self, folder: Path, **changes: Any) -> dict[str, Any]:
        monitor = MergeReadyLoop(folder)
        monitor.prepare(linear())
        return monitor.state_dict() | changes

    def test_another_step(self, tmp_path: Path) -> None:
        monitor = MergeReadyLoop(tmp_path)
        monitor.load_state_dict(self.state(tmp_path, step=7))
        with pytest.raises(OptionError, match="`step` is 8, but the loaded state was saved after step 7"):
            monitor.prepare(linear(), step=8)

    def test_no_step(self, tmp_path: Path) -> None:
        monitor = MergeReadyLoop(tmp_path)
        monitor.load_state_dict(self.state(tmp_path, step=None))
        with pytest.raises(HistoryError, match="after which step"):
            monitor.prepare(linear())

    def test_another_version(self, tmp_path: Path) -> None:
        monitor = MergeReadyLoop(tmp_path)
        monitor.load_state_dict(self.state(tmp_path, version=99))
        with pytest.raises(HistoryError, match="version 99"):
            monitor.prepare(linear())


def test_a_run_that_had_no_monitor_is_continued_at_its_step(tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in linear().state_dict().items()}
    model = linear()
    advance(model)
    monitor = MergeReadyLoop(tmp_path, base=base, measure=EVERY_STEP)
    monitor.prepare(model, step=40)
    advance(model)
    assert monitor.step()["mergeready/norm"] == pytest.approx(10.0)
    assert monitor.history.metrics[0].step == 41
