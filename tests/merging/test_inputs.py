"""What a merge is only continued with if nothing of it changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.merging.inputs import file_fingerprint, job_key
from mergeready.merging.plan import MergeJob
from tests.merging.worlds import World, make_world, state

MIB = 2**20


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def key(world: World, method: str = "ties", **options: Any) -> str | None:
    return job_key(MergeJob.make(world.base_folder, world.folders, method, **options))


def test_the_same_inputs_have_the_same_key_whatever_does_not_matter(world: World) -> None:
    first = key(world)
    assert first is not None
    assert len(first) == 64
    assert key(world, threads=1, memory=10**9) == first


@pytest.mark.parametrize(
    "options",
    [
        {"method": "average"},
        {"density": 0.3},
        {"scale": 0.5},
        {"weights": [1.0, 0.5]},
        {"overrides": {"query": {"scale": 0.5}}},
        {"dtype": torch.bfloat16},
        {"arithmetic": "float64"},
        {"statistics": "average"},
        {"shard_bytes": 20_000},
    ],
)
def test_whatever_matters_is_in_the_key(world: World, options: dict[str, Any]) -> None:
    assert key(world, **options) != key(world)


def flip_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def save_again(folder: Path) -> None:
    """What is saved anew may differ where no sample looks."""
    times = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def change_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')


@pytest.mark.parametrize("which", ["base", "expert-1"])
@pytest.mark.parametrize("change", [flip_a_byte, save_again, change_the_tokenizer])
def test_a_changed_input_is_another(world: World, which: str, change: Callable[[Path], None]) -> None:
    before = key(world)
    change(world.root / which)
    assert key(world) != before


def test_order_matters(world: World) -> None:
    jobs = [
        MergeJob.make(world.base_folder, folders, "ties") for folders in (world.folders, world.folders[::-1])
    ]
    assert job_key(jobs[0]) != job_key(jobs[1])


def test_what_is_in_memory_cannot_be_found_again(world: World) -> None:
    for base, experts in ((state(world.base), world.folders), (world.base_folder, world.experts)):
        assert job_key(MergeJob.make(base, experts, "ties")) is None


@pytest.mark.parametrize("place", [0, 700_000, 3 * MIB - 1])
def test_a_file_is_known_by_its_beginning_and_its_end(tmp_path: Path, place: int) -> None:
    content = bytearray(3 * MIB)
    (tmp_path / "a").write_bytes(content)
    shutil.copyfile(tmp_path / "a", tmp_path / "copy")
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert file_fingerprint(tmp_path / "a") == file_fingerprint(tmp_path / "copy")
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")


def test_a_file_is_known_by_its_size_and_by_most_of_what_is_saved_anew(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2 * MIB))
    (tmp_path / "longer").write_bytes(bytes(2 * MIB + 1))
    (tmp_path / "other").write_bytes(bytes(MIB) + b"\1" * (MIB // 4) + bytes(MIB * 3 // 4))
    assert len({file_fingerprint(tmp_path / name) for name in ("a", "longer", "other")}) == 3
