from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.tracking import GeneralTracker
from torch import nn

from mergeready import DriftPenalty, NormBudget, Schedule, SharpnessAware
from mergeready.accelerate import MergeReadyLoop
from mergeready.errors import HistoryError, OptionError, UnsupportedError
from tests.loops import batches, load, loader, make_world, optimizer_of, options
from tests.trainers import weights_of

EVERY_STEP = Schedule(every=1)


@pytest.fixture(autouse=True)
def _own_gradient_state() -> Iterator[None]:
    """It is shared by all accelerators of a process."""
    GradientState._reset_state()
    yield
    GradientState._reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Memory(GeneralTracker):
    name = "memory"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))


class Run:
    """A hand-written loop over a linear model."""

    def __init__(self, folder: Path, accumulate: int = 1, log_with: Any = None, **options: Any) -> None:
        self.accelerator = Accelerator(
            cpu=True,
            project_dir=str(folder),
            gradient_accumulation_steps=accumulate,
            log_with=log_with,
        )
        self.accelerator.init_trackers("run")
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        self.base = weights_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.monitor = MergeReadyLoop(self.accelerator, **({"measure": EVERY_STEP} | options))

    def micro_step(self) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(torch.ones(4, 3)).sum())
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.monitor.step()


def steps(monitor: MergeReadyLoop) -> list[int]:
    return [record.step for record in monitor.history.metrics]


def test_micro_batches_are_not_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, accumulate=3)
    run.monitor.prepare(run.model)
    for _ in range(9):
        run.micro_step()
    assert steps(run.monitor) == [1, 2, 3]


def test_a_penalty_joins_a_step_once_however_many_micro_batches_it_has(tmp_path: Path) -> None:
    ends = []
    for accumulate in (1, 3):
        run = Run(tmp_path / str(accumulate), accumulate, techniques=[DriftPenalty(strength=0.5)])
        run.monitor.prepare(run.model)
        for _ in range(4 * accumulate):
            with run.accelerator.accumulate(run.model):
                for _ in run.monitor.passes():
                    run.accelerator.backward(run.model(torch.ones(4, 3)).sum())
                run.optimizer.step()
                run.optimizer.zero_grad()
            run.monitor.step()
        ends.append(weights_of(run.model))
    assert not torch.equal(ends[0]["weight"], run.base["weight"])
    torch.testing.assert_close(ends[0], ends[1])


def test_the_gradient_of_a_part_of_a_step_is_not_climbed(tmp_path: Path) -> None:
    run = Run(tmp_path, accumulate=2, techniques=[SharpnessAware()])
    run.monitor.prepare(run.model)
    with (
        run.accelerator.accumulate(run.model),
        pytest.raises(UnsupportedError, match="all micro-batches of a step inside one"),
    ):
        next(run.monitor.passes())


def test_files_are_under_the_project(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.monitor.prepare(run.model)
    run.micro_step()
    run.monitor.finish()
    assert (tmp_path / "mergeready/summary.json").exists()


def test_a_folder_is_needed() -> None:
    with pytest.raises(OptionError, match="no `project_dir`"):
        MergeReadyLoop(Accelerator(cpu=True))


def test_trackers_get_the_scalars(tmp_path: Path) -> None:
    tracker = Memory()
    run = Run(tmp_path, log_with=tracker, measure=Schedule(every=2, geometric=False))
    run.monitor.prepare(run.model)
    for _ in range(4):
        run.micro_step()
    run.monitor.finish()
    assert [step for step, _ in tracker.rows] == [2, 4]
    norms = [values["mergeready/norm"] for _, values in tracker.rows]
    assert norms == [record.norm for record in run.monitor.history.metrics]


def test_tensorboard_gets_scalars_and_images(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the dev extra brings tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path), log_with="tensorboard")
    accelerator.init_trackers("log")
    model = load(world)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    monitor = MergeReadyLoop(accelerator, **options(world))
    monitor.prepare(model)
    for _, batch in zip(range(3), batches(loader()), strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        monitor.step()
    monitor.finish()
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    [event] = events.Scalars("mergeready/merged/ties")
    assert (event.step, event.value) == (3, pytest.approx(monitor.history.probes[0].merges["ties"].merged))
    for name in (
        "mergeready/figures/curve/ties",
        "mergeready/figures/curve/task_arithmetic",
        "mergeready/figures/growth",
    ):
        [image] = events.Images(name)
        assert image.step == 3
        assert image.width > image.height > 100


class TestCheckpoints:
    def saved(self, folder: Path) -> tuple[Run, Path]:
        run = Run(folder)
        run.monitor.prepare(run.model)
        for _ in range(2):
            run.micro_step()
        run.accelerator.save_state(str(folder / "checkpoint"))
        return run, folder / "checkpoint"

    def test_the_state_is_a_json_file_beside_the_weights(self, tmp_path: Path) -> None:
        """register_for_checkpointing would pickle it, and load it without weights_only."""
        _, checkpoint = self.saved(tmp_path)
        state = json.loads((checkpoint / "mergeready.json").read_text())
        assert state["step"] == 2
        assert [record["kind"] for record in state["history"]] == ["start", "metrics", "metrics"]
        assert not list(checkpoint.glob("custom_checkpoint*"))

    def test_it_is_continued(self, tmp_path: Path) -> None:
        first, checkpoint = self.saved(tmp_path)
        run = Run(tmp_path)
        run.accelerator.load_state(str(checkpoint))
        run.monitor.prepare(run.model)
        assert run.monitor.steps == 2
        run.micro_step()
        assert steps(run.monitor) == [1, 2, 3]
        assert list(run.monitor.history)[:3] == list(first.monitor.history)

    def test_loading_after_prepare_is_refused_before_anything_is_loaded(self, tmp_path: Path) -> None:
        _, checkpoint = self.saved(tmp_path)
        run = Run(tmp_path)
        run.monitor.prepare(run.model)
        before = weights_of(run.model)
        with pytest.raises(OptionError, match=r"before `prepare\(model\)`"):
            run.accelerator.load_state(str(checkpoint))
        assert all(torch.equal(before[name], value) for name, value in weights_of(run.model).items())

    def test_one_without_a_monitor_needs_its_step(self, tmp_path: Path) -> None:
        """Else its trained weights would be taken for the base."""
        _, checkpoint = self.saved(tmp_path)
        (checkpoint / "mergeready.json").unlink()
        run = Run(tmp_path / "new")
        run.accelerator.load_state(str(checkpoint))
        with pytest.raises(HistoryError, match="pass the number of optimizer steps"):
            run.monitor.prepare(run.model)
        with pytest.raises(HistoryError, match="Pass `base`"):
            run.monitor.prepare(run.model, step=2)
        run.monitor.monitor.base = run.base
        run.monitor.prepare(run.model, step=2)
        run.micro_step()
        assert steps(run.monitor) == [3]
        assert run.monitor.history.metrics[0].norm > 0

    def test_one_saved_before_prepare_holds_no_state(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        run.accelerator.save_state(str(tmp_path / "checkpoint"))
        assert not (tmp_path / "checkpoint/mergeready.json").exists()

    def test_only_the_main_process_writes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(tmp_path)
        run.monitor.prepare(run.model)
        monkeypatch.setattr(type(run.accelerator), "is_main_process", False)
        (tmp_path / "checkpoint").mkdir()
        run.monitor._save([], [], str(tmp_path / "checkpoint"))
        assert not list((tmp_path / "checkpoint").iterdir())


class TestStop:
    def test_any_process_stops_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(tmp_path)
        run.monitor.prepare(run.model)
        run.micro_step()
        assert not run.monitor.should_stop
        asked: list[str] = []

        def another_process_stops(flag: torch.Tensor, reduction: str) -> torch.Tensor:
            asked.append(reduction)
            return flag + 1

        monkeypatch.setattr(run.accelerator, "reduce", another_process_stops)
        run.micro_step()
        assert asked == ["sum"]
        assert run.monitor.should_stop

    def test_triggers_of_the_script_are_left_alone(self, tmp_path: Path) -> None:
        """A script's own trigger must neither stop the run as if we had, nor be lost."""
        run = Run(tmp_path)
        run.monitor.prepare(run.model)
        run.accelerator.set_trigger()
        run.micro_step()
        assert not run.monitor.should_stop
        assert run.accelerator.check_trigger()

    def test_our_stop_sets_no_trigger(self, tmp_path: Path) -> None:
        run = Run(tmp_path, stop=NormBudget(max_norm=1e-9))
        run.monitor.prepare(run.model)
        run.micro_step()
        assert run.monitor.should_stop
        assert not run.accelerator.check_trigger()
