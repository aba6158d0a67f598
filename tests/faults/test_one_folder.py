"""Two at work on one output folder, a clock that jumps, and a history that was damaged."""

from __future__ import annotations

import multiprocessing as mp
import time
from pathlib import Path

import pytest
import torch

from mergeready import MergeReadyLoop, Schedule, merge, read_history
from mergeready.errors import BusyError, HistoryError, OutputExistsError
from tests.models import perturb, tiny_bert


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_bert().save_pretrained(folder / "base")
    for seed, name in enumerate(("law", "math"), start=1):
        perturb(tiny_bert(), seed).save_pretrained(folder / name)
    return folder


def _merge(world: Path, output: Path, start: object, found: object) -> None:
    torch.set_num_threads(1)
    start.wait()  # type: ignore[attr-defined]
    try:
        merge(world / "base", [world / "law", world / "math"], "ties", output=output)
        found.put("done")  # type: ignore[attr-defined]
    except (BusyError, OutputExistsError) as error:
        found.put(type(error).__name__)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_of_merges_into_one_folder_one_wins_and_the_rest_are_told(world: Path, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    start, found = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_merge, args=(world, tmp_path / "out", start, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    outcomes = sorted(found.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert outcomes.count("done") == 1, outcomes
    alone = merge(world / "base", [world / "law", world / "math"], "ties", output=tmp_path / "alone")
    ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / "out", alone))
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def train(folder: Path, steps: int = 4) -> None:
    model = tiny_bert()
    monitor = MergeReadyLoop(folder, base=tiny_bert(), measure=Schedule(every=1), picks=None)
    monitor.prepare(model, total_steps=steps)
    for _ in range(steps):
        with torch.no_grad():
            model.classifier.weight += 0.01
        monitor.step()
    monitor.finish()


def test_a_clock_that_jumps_changes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "steady")
    jumps = iter([0.0, 1e9, -1e9, 5.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    train(tmp_path / "jumping")
    assert (tmp_path / "jumping/history.jsonl").read_bytes() == (
        tmp_path / "steady/history.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"",
        lambda line: b"\x00" * len(line),
        lambda line: line.replace(b'"step"', b'"stop"'),
        lambda line: b"[1]",
    ],
    ids=["cut", "empty", "zeros", "renamed", "no record"],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: object) -> None:
    train(tmp_path / "run")
    path = tmp_path / "run" / "history.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage(lines[2])  # type: ignore[operator]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(HistoryError, match=r"history\.jsonl"):
        read_history(path)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe no text\n"], ids=["whole", "damaged"])
def test_a_new_run_in_an_old_folder_loses_nothing(tmp_path: Path, damage: bytes) -> None:
    train(tmp_path / "run", steps=4)
    path = tmp_path / "run" / "history.jsonl"
    old = path.read_bytes() + damage
    path.write_bytes(old)
    train(tmp_path / "run", steps=2)
    assert path.with_suffix(".superseded.jsonl").read_bytes() == old
    assert [record.step for record in read_history(path).metrics] == [1, 2]
