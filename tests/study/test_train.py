from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeready.study.rates import Rate
from mergeready.study.settings import Arm, RateSettings
from mergeready.study.train import _batches, _seed, train_run
from tests.study import toy


def run(folder: Path, arm: Arm, steps: tuple[int, ...] = (3, 6), total: int = 6) -> dict[str, object]:
    folder.mkdir()
    return train_run(toy.suite(0), "red", arm, 0, folder, steps=steps, total=total)


def test_the_run_is_adamw_written_out(tmp_path: Path) -> None:
    arm = Arm(learning_rate=0.05, weight_decay=0.02, batch_size=8, schedule={"kind": "linear"})  # type: ignore[arg-type]
    record = run(tmp_path / "run", arm)
    suite, losses = toy.suite(0), []
    model, task = suite.model().train(), suite.tasks["red"]
    torch.manual_seed(_seed(0, "red"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.02)
    batches = _batches(40, 8, _seed(0, "red"))
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 6)
        loss = task.loss(model, task.collate([task.train[i] for i in next(batches)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert record["losses"] == losses
    saved = load_file(tmp_path / "run" / "step-6.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


def test_an_earlier_end_is_the_same_run_cut_short(tmp_path: Path) -> None:
    arm = Arm(learning_rate=0.05, batch_size=8, schedule={"kind": "cosine"})  # type: ignore[arg-type]
    run(tmp_path / "whole", arm)
    run(tmp_path / "short", arm, steps=(3,))
    whole, short = (load_file(tmp_path / name / "step-3.safetensors") for name in ("whole", "short"))
    assert all(torch.equal(whole[name], short[name]) for name in whole)


def test_every_epoch_shows_every_example_once() -> None:
    batches = _batches(10, 5, seed=3)
    epochs = [sorted(next(batches) + next(batches)) for _ in range(3)]
    assert epochs == [list(range(10))] * 3


def test_a_run_stops_when_validation_no_longer_improves(tmp_path: Path) -> None:
    arm = Arm(learning_rate=1e-9, batch_size=8, evaluate_every=2, stop={"patience": 2})  # type: ignore[arg-type]
    record = run(tmp_path / "stopped", arm, steps=(3, 40), total=40)
    assert record["ended"] == 6  # nothing improves on step 2; steps 4 and 6 are waited for
    assert record["saved"] == [3, 6]
    assert record["stopped"] == "validation was best at step 2"


def test_a_plateau_halves_the_rate_that_the_next_step_takes() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    settings = RateSettings(kind="plateau", factor=0.5, patience=1)
    rate, seen = Rate(settings, optimizer, 10, greater_is_better=True), []
    for step, value in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.7, 0.1], start=1):
        rate.before(step)
        seen.append(optimizer.param_groups[0]["lr"])
        rate.evaluated(value)
    assert seen == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4])


def test_an_adapter_is_kept_as_one_and_starts_alike_for_all_tasks_of_a_seed(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    arm = Arm(learning_rate=1e-9, batch_size=8, adapter={"rank": 2, "targets": ["0", "3"]})  # type: ignore[arg-type]
    first: list[dict[str, torch.Tensor]] = []
    for task in ("red", "green"):
        folder = tmp_path / task
        folder.mkdir()
        train_run(toy.suite(0), task, arm, 0, folder, steps=[1], total=1)
        first.append(load_file(folder / "step-1" / "adapter_model.safetensors"))
    for name in first[0]:
        if "lora_A" in name:
            torch.testing.assert_close(first[0][name], first[1][name], atol=1e-7, rtol=0)
