from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn

from mergeready import Schedule
from mergeready.fabric import MergeReadyLoop, log_images

EVERY_STEP = Schedule(every=1)


class Run:
    """A Fabric loop over a linear model."""

    def __init__(self, folder: Path, loggers: Any = None, **options: Any) -> None:
        self.fabric = Fabric(accelerator="cpu", loggers=loggers)
        torch.manual_seed(0)
        self.plain = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(self.plain.parameters(), lr=0.1)
        self.model, self.optimizer = self.fabric.setup(self.plain, optimizer)
        self.monitor = MergeReadyLoop(self.fabric, folder, **({"measure": EVERY_STEP} | options))
        self.state = {"model": self.model, "optimizer": self.optimizer, "monitor": self.monitor}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.fabric.backward(self.model(torch.ones(4, 3)).sum())
        self.optimizer.step()
        self.monitor.step()


def test_looks_through_fabrics_wrapper(tmp_path: Path) -> None:
    """Else names would start with _forward_module, and no base or peer would fit."""
    run = Run(tmp_path)
    run.monitor.prepare(run.model)
    assert run.monitor.monitor.live.model is run.plain
    assert set(run.monitor.monitor.live.targets) == {"weight", "bias"}


def test_a_model_that_fabric_did_not_set_up_works_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.monitor.prepare(run.plain)
    assert set(run.monitor.monitor.live.targets) == {"weight", "bias"}


def test_loggers_get_the_scalars(tmp_path: Path) -> None:
    run = Run(tmp_path, loggers=CSVLogger(tmp_path, name="", version="log", flush_logs_every_n_steps=1))
    run.monitor.prepare(run.model)
    for _ in range(3):
        run.step()
    lines = (tmp_path / "log/metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    assert [(int(row["step"]), float(row["mergeready/norm"])) for row in rows] == [
        (record.step, record.norm) for record in run.monitor.history.metrics
    ]


def test_the_object_stands_in_fabrics_state(tmp_path: Path) -> None:
    first = Run(tmp_path / "run")
    first.monitor.prepare(first.model)
    for _ in range(2):
        first.step()
    first.fabric.save(tmp_path / "saved", first.state)
    saved = torch.load(tmp_path / "saved", weights_only=True)  # so it holds nothing but plain data
    assert saved["monitor"]["step"] == 2
    again = Run(tmp_path / "run")
    again.fabric.load(tmp_path / "saved", again.state)
    again.monitor.prepare(again.model)
    again.step()
    assert [record.step for record in again.monitor.history.metrics] == [1, 2, 3]


def test_any_process_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.monitor.prepare(run.model)
    asked: list[tuple[bool, bool]] = []

    def another_process_stops(decision: bool, all: bool = True) -> bool:  # noqa: A002 - Fabric's name
        asked.append((decision, all))
        return True

    monkeypatch.setattr(run.fabric.strategy, "reduce_boolean_decision", another_process_stops)
    run.step()
    assert asked == [(False, False)]
    assert run.monitor.should_stop


class TestImages:
    def test_loggers_that_take_none_cost_no_drawing(self, tmp_path: Path) -> None:
        def draw() -> Any:
            raise AssertionError("nobody wants it")

        log_images([CSVLogger(tmp_path)], draw, 3)

    def test_a_logger_with_log_image_is_given_each(self) -> None:
        class Takes:
            def __init__(self) -> None:
                self.got: list[Any] = []

            def log_image(self, key: str, images: list[Any], step: int) -> None:
                self.got.append((key, images, step))

        logger = Takes()
        log_images([logger], lambda: {"a": 1, "b": 2}, 3)  # type: ignore[dict-item]
        assert logger.got == [("a", [1], 3), ("b", [2], 3)]
