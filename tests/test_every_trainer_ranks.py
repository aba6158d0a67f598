"""Two ranks under DDP and FSDP2, in every trainer but transformers', which has its own: all make the same calls.

Both ranks are given the same batches, so that the run is the single process's run and its history must be too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mergeready
import mergeready.accelerate
import mergeready.fabric
import mergeready.lightning
from tests.loops import (
    STEPS,
    Crash,
    Lit,
    Saving,
    batches,
    lightning_trainer,
    load,
    loader,
    make_world,
    optimizer_of,
    options,
    run_accelerate,
    run_plain,
)
from tests.ranks import run_ranks
from tests.sharded import force_fsdp_on_cpu

pytestmark = pytest.mark.slow


def shard(model: Any, mesh: Any = None) -> Any:
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def under_lightning(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    callback = mergeready.lightning.MergeReadyCallback(**options(world, **changes))
    trainer = lightning_trainer(
        folder,
        callback,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(Lit(load(world)), loader())
    return int(trainer.global_step)


class ShardedLit(Lit):
    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            shard(self.net, self.device_mesh["data_parallel"])


def under_lightning_fsdp2(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    callback = mergeready.lightning.MergeReadyCallback(**options(world, **changes))
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    trainer = lightning_trainer(folder, callback, strategy=strategy, devices=2, use_distributed_sampler=False)
    trainer.fit(ShardedLit(load(world)), loader())
    return int(trainer.global_step)


def under_plain_fsdp2(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    model = shard(load(world))
    monitor = mergeready.MergeReadyLoop(folder / "mergeready", **options(world, **changes))
    return drive(monitor, model, optimizer_of(model), torch.Tensor.backward)


def under_accelerate(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    model = load(world)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world, **changes))
    return drive(monitor, prepared, optimizer, accelerator.backward)


def under_accelerate_fsdp2(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    force_fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
    )
    accelerator = Accelerator(cpu=True, project_dir=str(folder), fsdp_plugin=plugin)
    model = load(world)
    before = set(map(id, model.parameters()))
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert before.isdisjoint(
        map(id, prepared.parameters())
    )  # others, which `prepare(model)` of ours has to be given
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world, **changes))
    return drive(monitor, prepared, optimizer, accelerator.backward)


def under_fabric(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = load(world)
    prepared, optimizer = fabric.setup(model, optimizer_of(model))
    monitor = mergeready.fabric.MergeReadyLoop(fabric, folder / "mergeready", **options(world, **changes))
    return drive(monitor, prepared, optimizer, fabric.backward)


def under_plain_ddp(world: Path, folder: Path, changes: dict[str, Any]) -> int:
    model = load(world)
    monitor = mergeready.MergeReadyLoop(folder / "mergeready", **options(world, **changes))
    return drive(monitor, DistributedDataParallel(model), optimizer_of(model), torch.Tensor.backward)


def drive(monitor: mergeready.MergeReadyLoop, model: Any, optimizer: Any, backward: Any) -> int:
    monitor.prepare(model, total_steps=STEPS)
    for batch in batches(loader()):
        backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.should_stop or monitor.steps == STEPS:
            break
    monitor.finish()
    return monitor.steps


RUNS = {
    "lightning": under_lightning,
    "accelerate": under_accelerate,
    "fabric": under_fabric,
    "plain": under_plain_ddp,
    "lightning-fsdp2": under_lightning_fsdp2,
    "plain-fsdp2": under_plain_fsdp2,
    "accelerate-fsdp2": under_accelerate_fsdp2,
}


def on_a_rank(name: str, world: Path, folder: Path, changes: dict[str, Any]) -> int:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2", NODE_RANK="0")
    return RUNS[name](world, folder, changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    run_plain(world, world / "single")
    return world


def records(folder: Path) -> list[Any]:
    lines = (folder / "mergeready/history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def close(a: Any, b: Any) -> bool:
    """Equal, numbers to 1e-6: sums that are split over ranks round differently."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float):
        return abs(a - b) <= 1e-6 * max(1.0, abs(b))
    return bool(a == b)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_write_one_history_as_a_single_process_does(world: Path, tmp_path: Path, name: str) -> None:
    assert run_ranks(on_a_rank, 2, name, world, tmp_path, {}) == [STEPS, STEPS]
    assert close(records(tmp_path), records(world / "single"))
    picks = [path / "mergeready/picks/picks.json" for path in (tmp_path, world / "single")]
    steps = [{k: v["step"] for k, v in json.loads(path.read_text()).items()} for path in picks]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_stop_together(world: Path, tmp_path: Path, name: str) -> None:
    """At the third measurement, where a single process stops, with its figures."""
    norms = [record["norm"] for record in records(world / "single") if record["kind"] == "metrics"]
    changes: dict[str, Any] = {
        "probe": None,
        "stop": mergeready.NormBudget(max_norm=(norms[1] + norms[2]) / 2),
    }
    assert run_ranks(on_a_rank, 2, name, world, tmp_path, changes) == [4, 4]
    if not (world / "stopped").exists():
        run_plain(world, world / "stopped", **changes)
    assert records(tmp_path)[-1]["kind"] == "decision"
    ours, expected = (
        [r for r in records(path) if r["kind"] != "decision"] for path in (tmp_path, world / "stopped")
    )
    assert close(ours, expected)


def accelerated(world: Path, folder: Path, crash: int | None, resume: bool) -> None:
    """Batches are shared out over the ranks, as accelerate does by itself."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    with contextlib.suppress(Crash):
        run_accelerate(world, folder, Saving(every=4, crash=crash, resume=resume))


def test_two_ranks_that_crash_and_are_resumed_equal_an_uninterrupted_run(world: Path, tmp_path: Path) -> None:
    run_ranks(accelerated, 2, world, tmp_path / "whole", None, False)
    run_ranks(accelerated, 2, world, tmp_path / "parts", 11, False)
    assert records(tmp_path / "parts")[-1]["step"] == 10
    run_ranks(accelerated, 2, world, tmp_path / "parts", None, True)
    whole, parts = (tmp_path / name / "mergeready" for name in ("whole", "parts"))
    assert (parts / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in (folder / "picks").rglob("model*.safetensors")
        }
        for folder in (whole, parts)
    ]
    assert files[0]
    assert files[0] == files[1]


def loaded(world: Path, folder: Path) -> tuple[int, int]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    model = load(world)
    prepared, _ = accelerator.prepare(model, optimizer_of(model))
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world, probe=None))
    accelerator.load_state(str(folder / f"rank-{os.environ['RANK']}"))
    monitor.prepare(prepared)
    return monitor.steps, len(monitor.history)


def test_the_state_that_the_first_machine_wrote_serves_all(world: Path, tmp_path: Path) -> None:
    """Without a shared file system, other machines have a checkpoint without it."""
    run_ranks(accelerated, 2, world, tmp_path, 5, False)
    for rank in range(2):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / f"rank-{rank}")
    (tmp_path / "rank-1/mergeready.json").unlink()
    first, second = run_ranks(loaded, 2, world, tmp_path)
    assert first == second
    assert first[0] == 4
