from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForSequenceClassification

from mergeready.errors import FormatError
from mergeready.weights import SafetensorsFolder
from tests.models import tiny_bert

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers itself split into shards."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_bert().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def content(folder: SafetensorsFolder) -> dict[str, Tensor]:
    return {name: folder.read(name) for name in folder.infos}


def test_shards_together_are_the_model(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    state = tiny_bert().state_dict()
    assert len(folder.files) == len(list(sharded.glob("*.safetensors"))) > 3
    assert folder.infos.keys() == state.keys()
    assert all(torch.equal(folder.read(name), state[name]) for name in state)
    assert folder.metadata == {"format": "pt"}


@given(data=st.data())
def test_slices_and_rows_equal_load_file(sharded: Path, data: st.DataObject) -> None:
    folder = SafetensorsFolder(sharded)
    name = data.draw(st.sampled_from(list(folder.infos)))
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][name]
    expected = load_file(sharded / shard)[name]
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    assert torch.equal(folder.read_flat(name, start, stop), expected.reshape(-1)[start:stop])
    first = data.draw(st.integers(0, len(expected)))
    last = data.draw(st.integers(first, len(expected)))
    assert torch.equal(folder.read_rows(name, first, last), expected[first:last])


def test_tensors_come_file_by_file_in_stored_order(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    assert list(folder.infos) == [name for file in folder.files for name in file.infos]


def test_one_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.tensor(2.5), "d": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        read = content(SafetensorsFolder(path))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert read["c"].shape == ()
        assert read["d"].shape == (0, 3)


def test_the_whole_file_wins_over_an_index_as_in_transformers(broken: Path) -> None:
    """Saving whole over a sharded save leaves the old index behind."""
    new = tiny_bert(seed=5)
    new.save_pretrained(broken, max_shard_size="1GB")
    loaded = BertForSequenceClassification.from_pretrained(broken).state_dict()
    assert torch.equal(loaded["classifier.weight"], new.state_dict()["classifier.weight"])
    assert (broken / INDEX).exists()
    read = content(SafetensorsFolder(broken))
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_tensor_that_the_index_leaves_out_is_not_listed(broken: Path) -> None:
    edit_index(broken, lambda names: names.pop("classifier.bias"))
    assert "classifier.bias" not in SafetensorsFolder(broken).infos


@pytest.mark.parametrize("where", ["../outside.safetensors", "sub/x.safetensors", "..", ""])
def test_files_outside_the_folder_are_refused(broken: Path, where: str) -> None:
    save_file({"classifier.bias": torch.zeros(3)}, broken.parent / "outside.safetensors")
    edit_index(broken, lambda names: names.update({"classifier.bias": where}))
    with pytest.raises(FormatError, match=r"outside its folder|not there"):
        SafetensorsFolder(broken)


def test_an_absolute_path_is_refused(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "x.safetensors"
    save_file({"classifier.bias": torch.zeros(3)}, secret)
    edit_index(broken, lambda names: names.update({"classifier.bias": str(secret)}))
    with pytest.raises(FormatError, match="outside its folder"):
        SafetensorsFolder(broken)


def test_all_missing_shards_are_listed(broken: Path) -> None:
    gone = sorted(broken.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(FormatError, match=f"not there: {gone[0].name}, {gone[1].name}"):
        SafetensorsFolder(broken)


def test_tensors_that_their_shard_lacks_are_listed(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[0].name
    edit_index(broken, lambda names: names.update({"ghost.weight": shard, "ghost.bias": shard}))
    with pytest.raises(FormatError, match=r"do not hold them: ghost\.weight, ghost\.bias"):
        SafetensorsFolder(broken)


def test_a_truncated_shard_is_named(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=shard.name):
        SafetensorsFolder(broken)


@pytest.mark.parametrize(
    "text",
    [
        b"<html>",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": null}',
    ],
)
def test_an_index_that_is_none_is_refused(broken: Path, text: bytes) -> None:
    (broken / INDEX).write_bytes(text)
    with pytest.raises(FormatError, match="is not a safetensors index"):
        SafetensorsFolder(broken)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        SafetensorsFolder(tmp_path / "nowhere")
