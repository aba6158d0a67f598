"""In every precision that a framework trains in on a CPU, the finest copy of the weights is what is measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import mergeready
from mergeready import Schedule, read_history
from tests import loops
from tests.loops import RUNS, STEPS, batches, load, loader, make_world, optimizer_of, options

PLACES: dict[str, tuple[Any, str, str]] = {
    "transformers": (loops, "make_trainer", "bf16"),
    "lightning": (loops.pl, "Trainer", "precision"),
    "fabric": (loops, "Fabric", "precision"),
    "accelerate": (loops, "Accelerator", "mixed_precision"),
}
OPTIONS: dict[str, Any] = {"probe": None, "measure": Schedule(every=4, geometric=False)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def one_accelerator() -> Iterator[None]:
    """A process has one state, of one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def true_norm(model: nn.Module, world: Path) -> float:
    """‖τ‖ in float64 from the weights that training left."""
    base = dict(load(world).named_parameters())
    total = sum(
        float((p.detach().double() - base[name].detach().double()).square().sum())
        for name, p in model.named_parameters()
    )
    return total**0.5


def last(folder: Path) -> Any:
    return read_history(folder / "mergeready/history.jsonl").metrics[-1]


def trained(
    world: Path, folder: Path, name: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, Any]:
    place, kind, key = PLACES[name]
    monkeypatch.setattr(place, kind, functools.partial(getattr(place, kind), **{key: precision}))
    model = RUNS[name](world, folder, **OPTIONS)
    return model, last(folder)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("transformers", True),
        ("lightning", "bf16-mixed"),
        ("lightning", "16-mixed"),
        ("fabric", "bf16-mixed"),
        ("accelerate", "bf16"),
    ],
)
def test_autocast_trains_and_is_measured_in_fp32(
    world: Path, tmp_path: Path, name: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = trained(world, tmp_path, name, precision, monkeypatch)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert record.step == STEPS
    assert record.norm == pytest.approx(true_norm(model, world), rel=1e-6)
    assert (record.resolution, record.unchanged) == (None, None)


@pytest.mark.parametrize(("name", "precision"), [("lightning", "bf16-true"), ("fabric", "bf16-true")])
def test_weights_that_exist_in_16_bits_only_are_said_to(
    world: Path, tmp_path: Path, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = trained(world, tmp_path, name, precision, monkeypatch)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert record.norm == pytest.approx(true_norm(model, world), rel=1e-6)
    assert record.resolution == pytest.approx(expected_resolution(model, record.norm), rel=1e-3)


def expected_resolution(model: nn.Module, norm: float) -> float:
    """From the format's own next numbers, which lie one higher when read as integers."""
    errors = 0.0
    for p in model.parameters():
        size = p.detach().abs()
        step = (size.view(torch.int16) + 1).view(size.dtype).double() - size.double()
        errors += float(step.square().sum()) / 12
    return errors**0.5 / norm


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loop_of_your_own_with_and_without_a_scaler(
    world: Path, tmp_path: Path, dtype: torch.dtype, scaled: bool
) -> None:
    """A step that the scaler skips changes nothing, and is a step all the same."""
    model = load(world)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**40, growth_interval=1)
    monitor = mergeready.MergeReadyLoop(tmp_path / "mergeready", **options(world, **OPTIONS))
    monitor.prepare(model, total_steps=STEPS, optimizer=optimizer)
    skipped = 0
    for _, batch in zip(range(STEPS), batches(loader()), strict=False):
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        monitor.step()
    monitor.finish()
    assert (skipped > 0) == (scaled and dtype == torch.float16)
    record = last(tmp_path)
    assert record.step == STEPS
    assert record.norm == pytest.approx(true_norm(model, world), rel=1e-6)
    assert record.resolution is None


class Rounding(torch.optim.AdamW):
    """AdamW on fp32 copies, kept in its state, which are rounded into 16-bit parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = closure() if closure is not None else None
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("master_param", p.detach().float())
            if p.grad is not None:
                kept -= 1e-3 * p.grad.float()
                p.copy_(kept)
        return result


@pytest.mark.parametrize("name", ["transformers", "lightning", "fabric", "accelerate", "plain"])
def test_masters_in_the_optimizer_are_what_is_measured(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Rounding] = []

    def optimizer_with_masters(model: nn.Module) -> Rounding:
        made.append(Rounding(model.parameters()))
        return made[-1]

    monkeypatch.setattr(loops, "optimizer_of", optimizer_with_masters)
    monkeypatch.setattr(loops, "load", lambda folder: load(folder).bfloat16())
    if name == "transformers":
        make = loops.make_trainer

        def with_optimizer(*args: Any, model: nn.Module, **changes: Any) -> Any:
            trainer = make(*args, model=model, **changes)
            trainer.optimizer = optimizer_with_masters(model)
            return trainer

        monkeypatch.setattr(loops, "make_trainer", with_optimizer)
    model = RUNS[name](world, tmp_path, **OPTIONS)
    base = dict(load(world).named_parameters())
    total = sum(
        float((made[-1].state[p]["master_param"].double() - base[n].detach().double()).square().sum())
        for n, p in model.named_parameters()
    )
    record = last(tmp_path)
    assert record.norm == pytest.approx(total**0.5, rel=1e-6)
    assert record.norm != pytest.approx(true_norm(model, world), rel=1e-3)
    assert record.resolution is None


def test_picks_say_what_rounding_left(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mergeready"
    monitor = mergeready.MergeReadyLoop(folder, **options(world, measure=Schedule(every=3, geometric=False)))
    model = load(world).bfloat16()
    optimizer = optimizer_of(model)
    monitor.prepare(model, total_steps=3, optimizer=optimizer)
    for _, batch in zip(range(3), batches(loader()), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    picks = json.loads((folder / "picks/picks.json").read_text())
    assert {pick["resolution"] for pick in picks.values()} == {last(tmp_path).resolution}
    assert last(tmp_path).resolution > 0
