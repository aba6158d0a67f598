"""Every logger gets the same scalars through each framework's own logging, and images where it takes them.

CSV is Lightning's and Fabric's own, and tested with them. TensorBoard under Lightning and accelerate likewise.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import mergeready.accelerate
import mergeready.lightning
from mergeready import History
from mergeready.transformers import MergeReadyCallback
from tests.loops import Lit, batches, lightning_trainer, load, loader, make_world, optimizer_of, options
from tests.trainers import make_trainer

CURVE, GROWTH, MERGED = "mergeready/figures/curve/ties", "mergeready/figures/growth", "mergeready/merged/ties"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run_transformers(world: Path, folder: Path, reporter: str, **changes: Any) -> History:
    callback = MergeReadyCallback(**options(world))
    make_trainer(folder, callback, model=load(world), report_to=reporter, **changes).train()
    return callback.history


def test_tensorboard_under_transformers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the dev extra brings tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    history = run_transformers(world, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars(f"train/{MERGED}")]
    assert logged == [(step, pytest.approx(value)) for step, value in history.merged("ties")]
    for name in (CURVE, GROWTH):
        [image] = events.Images(name)
        assert image.step == 12
        assert image.width > image.height > 100


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("wandb", reason="too large for a dev dependency")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield module
    module.finish()


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """All that was logged. Finishing a run does not wait for its file, so this does, for the last image."""
    deadline = time.monotonic() + 30
    while True:
        rows = _wandb_rows_so_far(folder)
        if any(f"{GROWTH}/_type" in row for row in rows) or time.monotonic() > deadline:
            return rows
        time.sleep(0.05)


def _wandb_rows_so_far(folder: Path) -> list[dict[str, Any]]:
    """What was logged, from the file that is sent when a run is synchronised: LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    content, position, parts = path.read_bytes(), 7, b""
    rows: list[dict[str, Any]] = []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too little is left of a block for a header
            position += 32768 - position % 32768
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_wandb_under_transformers(world: Path, tmp_path: Path, wandb: Any) -> None:
    history = run_transformers(world, tmp_path, "wandb")
    wandb.finish()
    rows = wandb_rows(tmp_path)
    name = f"train/{MERGED}"
    assert [(r["train/global_step"], r[name]) for r in rows if name in r] == history.merged("ties")
    assert [sum(f"{name}/_type" in row for row in rows) for name in (CURVE, GROWTH)] == [1, 1]


def test_wandb_under_lightning(world: Path, tmp_path: Path, wandb: Any) -> None:
    from lightning.pytorch.loggers import WandbLogger

    callback = mergeready.lightning.MergeReadyCallback(**options(world))
    trainer = lightning_trainer(tmp_path, callback, logger=WandbLogger(save_dir=tmp_path, offline=True))
    trainer.fit(Lit(load(world)), loader())
    wandb.finish()
    rows = wandb_rows(tmp_path)
    logged = [(r["trainer/global_step"], r[MERGED]) for r in rows if MERGED in r]
    assert logged == callback.history.merged("ties")
    assert [sum(f"{name}/_type" in row for row in rows) for name in (CURVE, GROWTH)] == [1, 1]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read when it is imported
        yield pytest.importorskip("trackio", reason="too large for a dev dependency")


def trackio_rows(project: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_run_records(project)
    return SQLiteStorage.get_logs(project, run["name"], run_id=run["id"])


def test_trackio_under_transformers(world: Path, tmp_path: Path, trackio: Any) -> None:
    history = run_transformers(world, tmp_path, "trackio", project="transformers")
    rows = trackio_rows("transformers")
    name = f"train/{MERGED}"
    logged = [(row["train/global_step"], row[name]) for row in rows if name in row]
    assert logged == [(step, pytest.approx(value)) for step, value in history.merged("ties")]
    assert [sum(name in row for row in rows) for name in (CURVE, GROWTH)] == [1, 1]


def test_trackio_under_accelerate(world: Path, tmp_path: Path, trackio: Any) -> None:
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path), log_with="trackio")
    accelerator.init_trackers("accelerate")
    model = load(world)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world))
    monitor.prepare(model)
    for _, batch in zip(range(3), batches(loader()), strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        monitor.step()
    monitor.finish()
    accelerator.end_training()
    rows = trackio_rows("accelerate")
    [row] = [row for row in rows if MERGED in row]
    assert row["step"] == 3
    assert row[MERGED] == pytest.approx(monitor.history.probes[0].merges["ties"].merged)
    assert [sum(name in row for row in rows) for name in (CURVE, GROWTH)] == [1, 1]
