from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeready.errors import FormatError
from mergeready.weights.safetensors_file import DTYPES, SafetensorsFile

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (4, 3), (2, 3, 5), (1, 1, 1, 1)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of every bit pattern that the dtype allows, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator, dtype=torch.uint8).bool()
    raw = torch.randint(256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsFile, dict[str, Tensor]]:
    """A file with every dtype in every shape, and what the safetensors library reads from it."""
    tensors = {
        f"{name} {shape}": random_bits(shape, dtype, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }
    path = tmp_path_factory.mktemp("file") / "all.safetensors"
    save_file(tensors, path)
    return SafetensorsFile(path), load_file(path)


def test_every_dtype_that_the_library_loads_is_known() -> None:
    assert set(DTYPES.items()) == set(safetensors.torch._TYPES.items())


def test_equals_load_file(everything: tuple[SafetensorsFile, dict[str, Tensor]]) -> None:
    file, expected = everything
    assert file.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (file.infos[name].shape, file.infos[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        read = file.read_flat(name, 0, tensor.numel())
        assert read.dtype == tensor.dtype
        assert read.shape == (tensor.numel(),)
        assert torch.equal(bits(read), bits(tensor)), name


@given(data=st.data())
def test_slices_equal_load_file(
    everything: tuple[SafetensorsFile, dict[str, Tensor]], data: st.DataObject
) -> None:
    file, expected = everything
    name = data.draw(st.sampled_from(sorted(expected)))
    count = expected[name].numel()
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(
        bits(file.read_flat(name, start, stop)), bits(expected[name].reshape(-1)[start:stop].clone())
    )


def test_names_come_in_stored_order(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(3), "a": torch.zeros(3), "c": torch.zeros(3).double()}, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert list(SafetensorsFile(tmp_path / "x").infos) == sorted(
        header, key=lambda name: header[name]["data_offsets"][0]
    )


def test_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "with", metadata={"format": "pt", "é": "ü"})
    save_file({"a": torch.zeros(1)}, tmp_path / "without")
    assert SafetensorsFile(tmp_path / "with").metadata == {"format": "pt", "é": "ü"}
    assert SafetensorsFile(tmp_path / "without").metadata == {}


def test_each_read_is_a_fresh_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    file.read_flat("a", 0, 5).zero_()
    assert torch.equal(file.read_flat("a", 0, 5), torch.arange(5.0))


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(KeyError, match="b"):
        SafetensorsFile(tmp_path / "x").read_flat("b", 0, 1)


def test_threads_read_what_they_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")  # the way of platforms that share one file position among threads
    values = torch.arange(50_000.0)
    save_file({"a": values}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda i: file.read_flat("a", 50 * i, 50 * i + 50), range(1000)))
    assert torch.equal(torch.cat(pieces), values)


def a_file(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(100.0), "b": torch.arange(100.0)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("length", [0, 3, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = a_file(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=r"x\.safetensors is not a complete safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 0])
def test_a_false_header_length_is_refused_at_once(tmp_path: Path, length: int) -> None:
    path = a_file(tmp_path)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(FormatError, match="not a complete safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',  # 3 values in 8 bytes
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',  # leaves a gap
        b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(FormatError, match="not a complete safetensors file"):
        SafetensorsFile(path)


def test_a_dtype_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    header = b'{"scales": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(FormatError, match=r"scales \(F8_E8M0\)"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_in_use_is_noticed(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    name = list(file.infos)[-1]
    assert torch.equal(file.read_flat(name, 0, 99), torch.arange(99.0))
    with pytest.raises(FormatError, match="changed while it was in use"):
        file.read_flat(name, 0, 100)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "nothing.safetensors")
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors through /proc")
def test_descriptors_are_released(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    files = [SafetensorsFile(path) for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 10
    files[0].close()
    files[0].close()
    del files
    assert len(os.listdir("/proc/self/fd")) == before
