from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.errors import BusyError, NonFiniteError
from mergeready.merging import folders, journal, merge_folders
from mergeready.weights.resumable import Workspace, resumable_folder
from tests.merging.processes import (
    die_on_one,
    fail_on_one,
    leave_the_journal,
    merge_by_rank,
    merge_or_say,
    merge_with_fuse,
    run,
    run_ranks,
)
from tests.merging.worlds import World, make_world
from tests.weights.test_writer import names

OPTIONS: dict[str, Any] = {
    "method": "ties",
    "density": 0.5,
    "dtype": torch.bfloat16,
    "shard_bytes": 20_000,
    "threads": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted merge makes."""
    return content(
        merge_folders(world.base_folder, world.folders, tmp_path_factory.mktemp("whole") / "out", **OPTIONS)
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def finished(output: Path) -> int:
    return len(journal.Journal.read(Workspace.beside(output).root))


def kill_points(world: World, folder: Path, chance: random.Random, number: int) -> list[int]:
    """What a merge does to files, counted: some of it at random, and the last thing it does."""
    assert run(merge_with_fuse, None, folder / "count", world.root, folder / "plain", OPTIONS) == 0
    count = int((folder / "count").read_text())
    assert count > 100
    return [count - 1, *chance.sample(range(count), number - 1)]


@pytest.mark.parametrize(
    ("threads", "number"),
    [(1, 3), *(pytest.param(threads, 12, marks=pytest.mark.slow) for threads in (1, 2))],
)
def test_a_killed_merge_ends_in_the_same_bytes(
    world: World, whole: dict[str, bytes], tmp_path: Path, threads: int, number: int
) -> None:
    for i, limit in enumerate(kill_points(world, tmp_path, random.Random(threads), number)):
        out = tmp_path / str(i)
        code = run(merge_with_fuse, limit, None, world.root, out, OPTIONS | {"threads": threads})
        # Two threads commit some tensors together, and may be done before a late point is reached.
        assert code == -signal.SIGKILL or (threads > 1 and code == 0)
        merge_folders(world.base_folder, world.folders, out, **OPTIONS | {"overwrite": out.exists()})
        assert content(out) == whole, limit
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def killed_halfway(world: World, output: Path) -> int:
    """Leave an interrupted merge behind; how many tensors it had finished."""
    assert run(merge_with_fuse, 100, None, world.root, output, OPTIONS) == -signal.SIGKILL
    assert not output.exists()
    return finished(output)


def count_merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    merged: list[str] = []
    real = folders.merged_chunks

    def counted(method: Any, name: str, *arguments: Any) -> Any:
        merged.append(name)
        return real(method, name, *arguments)

    monkeypatch.setattr(folders, "merged_chunks", counted)
    return merged


def test_what_is_finished_is_not_done_again(
    world: World, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = killed_halfway(world, tmp_path / "out")
    merged = count_merges(monkeypatch)
    merge_folders(world.base_folder, world.folders, tmp_path / "out", **OPTIONS)
    assert 5 < len(merged) == len(world.base.state_dict()) - done
    assert done > 5
    assert content(tmp_path / "out") == whole
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "changes",
    [{"scale": 0.5}, {"density": 0.4}, {"weights": [1, 2]}, {"arithmetic": "float64"}, {"dtype": None}],
)
def test_another_merge_starts_afresh(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    killed_halfway(world, tmp_path / "out")
    merged = count_merges(monkeypatch)
    merge_folders(world.base_folder, world.folders, tmp_path / "out", **OPTIONS | changes)
    assert len(merged) == len(world.base.state_dict())
    merge_folders(world.base_folder, world.folders, tmp_path / "plain", **OPTIONS | changes)
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_changed_inputs_start_afresh(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = shutil.copytree(world.root, tmp_path / "own")
    inputs = [own / "expert-0", own / "expert-1"]
    assert run(merge_with_fuse, 100, None, own, tmp_path / "out", OPTIONS) == -signal.SIGKILL
    shutil.copyfile(own / "expert-0" / "model.safetensors", own / "expert-1" / "model.safetensors")
    merged = count_merges(monkeypatch)
    merge_folders(own / "base", inputs, tmp_path / "out", **OPTIONS)
    assert len(merged) == len(world.base.state_dict())
    merge_folders(own / "base", inputs, tmp_path / "plain", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_ctrl_c_is_an_interruption_too(world: World, whole: dict[str, bytes], tmp_path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", **OPTIONS, progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert finished(tmp_path / "out") > 0
    merge_folders(world.base_folder, world.folders, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == whole


def test_what_cannot_be_found_again_is_not_kept(world: World, tmp_path: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(world.base_folder, world.experts, tmp_path / "out", progress=interrupt)
    assert names(tmp_path) == []


def test_a_second_process_is_kept_out(world: World, whole: dict[str, bytes], tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", "another key") as workspace:
        assert run(merge_or_say, world.root, tmp_path / "out", tmp_path / "said", OPTIONS) == 0
        assert (tmp_path / "said0").read_text().startswith("BusyError: another process is making")
        (workspace.folder / "model.safetensors").write_text("first")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "first"


def test_two_threads_of_one_process_are_two_as_well(world: World, tmp_path: Path) -> None:
    def again(*_: int) -> None:
        merge_folders(world.base_folder, world.folders, tmp_path / "out")

    with pytest.raises(BusyError):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", progress=again)
    assert names(tmp_path) == []


class TestRanks:
    @pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
    def test_the_same_bytes(self, world: World, tmp_path: Path, shard_bytes: int) -> None:
        options = OPTIONS | {"shard_bytes": shard_bytes}
        assert run_ranks(2, merge_or_say, world.root, tmp_path / "two", tmp_path / "said", options) == [0, 0]
        assert names(tmp_path) == ["two"]
        one = merge_folders(world.base_folder, world.folders, tmp_path / "one", **options)
        assert content(tmp_path / "two") == content(one)

    def test_both_take_part(self, world: World, tmp_path: Path) -> None:
        assert run_ranks(2, leave_the_journal, world.root, tmp_path / "two", OPTIONS) == [0, 0]
        parts = [(tmp_path / f"finished-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
        found = [{json.loads(line)["name"] for line in part} for part in parts]
        assert not found[0] & found[1]
        assert found[0] | found[1] == set(world.base.state_dict())
        assert min(map(len, found)) > 5

    def test_a_failure_on_one_reaches_all(self, world: World, tmp_path: Path) -> None:
        codes = run_ranks(2, fail_on_one, world.root, tmp_path / "out", tmp_path / "said", OPTIONS)
        assert codes == [0, 1]
        assert (tmp_path / "said0").read_text() == "MergeReadyError: rank 1 raised OSError: disk on fire"
        assert names(tmp_path) == ["said0"]

    def test_a_result_with_nan_is_refused_by_all(self, world: World, tmp_path: Path) -> None:
        options = OPTIONS | {"scale": 1e38, "dtype": torch.float16}
        with pytest.raises(NonFiniteError) as raised:
            merge_folders(world.base_folder, world.folders, tmp_path / "one", **options)
        assert run_ranks(2, merge_or_say, world.root, tmp_path / "two", tmp_path / "said", options) == [0, 0]
        for rank in (0, 1):
            assert (tmp_path / f"said{rank}").read_text() == f"NonFiniteError: {raised.value}"
        assert names(tmp_path) == ["said0", "said1"]

    def test_different_arguments_are_refused(self, world: World, tmp_path: Path) -> None:
        assert run_ranks(2, merge_by_rank, world.root, tmp_path / "two", tmp_path / "said") == [0, 0]
        for rank in (0, 1):
            assert "ranks were given different inputs" in (tmp_path / f"said{rank}").read_text()
        assert names(tmp_path) == ["said0", "said1"]

    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_killed_rank_ends_all_and_the_merge_goes_on(
        self, world: World, whole: dict[str, bytes], tmp_path: Path, victim: int
    ) -> None:
        said = tmp_path / "said"
        codes = run_ranks(2, die_on_one, victim, world.root, tmp_path / "out", said, OPTIONS)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 0, "it waits for the other"
        told = (tmp_path / f"said{1 - victim}").read_text()
        assert told.startswith("LostRankError: another rank was lost")
        assert not (tmp_path / "out").exists()
        assert finished(tmp_path / "out") > 5
        assert run_ranks(2, merge_or_say, world.root, tmp_path / "out", said, OPTIONS) == [0, 0]
        assert content(tmp_path / "out") == whole
