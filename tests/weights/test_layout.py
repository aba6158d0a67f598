from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeready.errors import FormatError, OptionError
from mergeready.weights.layout import FolderLayout
from mergeready.weights.source import TensorInfo
from mergeready.weights.writer import PieceWriter

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int64), "c": torch.ones(())}
INFOS = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("shard_bytes", [1, 60, 10**9])
def test_the_layout_is_that_of_the_files(tmp_path: Path, shard_bytes: int) -> None:
    layout = FolderLayout.plan(INFOS, shard_bytes=shard_bytes)
    layout.create(tmp_path)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        file.name: file.size for file in layout.files
    }
    assert [name for file in layout.files for name in file.offsets] == list(TENSORS)
    with PieceWriter(tmp_path, layout) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    for file in layout.files:
        content = (tmp_path / file.name).read_bytes()
        assert content.startswith(file.head)
        for name, offset in file.offsets.items():
            raw = TENSORS[name].numpy().tobytes()
            assert content[offset : offset + len(raw)] == raw


def test_files_are_as_large_as_the_library_s(tmp_path: Path) -> None:
    layout = FolderLayout.plan({"x": INFOS["a"]})
    save_file({"x": TENSORS["a"]}, tmp_path / "theirs", {"format": "pt"})
    assert layout.files[0].size == (tmp_path / "theirs").stat().st_size


def test_several_sittings(tmp_path: Path) -> None:
    layout = FolderLayout.plan(INFOS)
    layout.create(tmp_path)
    for name in TENSORS:
        with PieceWriter(tmp_path, layout) as writer:
            writer.write(name, TENSORS[name])
            writer.require_whole([name])
            with pytest.raises(FormatError, match="2 tensors were left incomplete"):
                writer.require_whole(TENSORS)
            writer.sync()
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_a_missing_file_is_no_leak(tmp_path: Path) -> None:
    layout = FolderLayout.plan(INFOS, shard_bytes=1)
    layout.create(tmp_path)
    (tmp_path / layout.files[-1].name).unlink()
    with pytest.raises(FileNotFoundError):
        PieceWriter(tmp_path, layout)


def test_options() -> None:
    with pytest.raises(OptionError, match="`shard_bytes` must be positive, not 0"):
        FolderLayout.plan(INFOS, shard_bytes=0)
    with pytest.raises(FormatError, match=r"complex128 of x, torch.complex128 of y"):
        FolderLayout.plan({name: TensorInfo((1,), torch.complex128) for name in "xy"})
