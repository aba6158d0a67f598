from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergeready.errors import FormatError, OptionError
from mergeready.weights import ModuleSource, SafetensorsFolder, StateDictSource, open_weights
from mergeready.weights.open import resolve_folder


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_each_kind_of_weights_has_its_source(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert isinstance(open_weights(tmp_path), SafetensorsFolder)
    assert isinstance(open_weights(str(tmp_path)), SafetensorsFolder)
    assert isinstance(open_weights(tmp_path / "model.safetensors"), SafetensorsFolder)
    assert isinstance(open_weights({"a": torch.ones(2)}), StateDictSource)
    assert isinstance(open_weights(nn.Linear(2, 2)), ModuleSource)
    source = open_weights(tmp_path)
    assert open_weights(source) is source


def test_the_label_is_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path.parent)
    assert open_weights(tmp_path.name).label == tmp_path.name


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert open_weights(f"~/{tmp_path.name}").read("a").tolist() == [1, 1]


def test_pickle_needs_a_flag(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2).bfloat16()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="can run code"):
        open_weights(tmp_path)
    source = open_weights(tmp_path, allow_pickle=True)
    assert source.read("a").tolist() == [0, 1, 2, 3]
    assert torch.equal(source.read("b"), torch.ones(2, 2).bfloat16())
    assert str(tmp_path) in source.label


def test_pickles_of_old_versions_and_by_their_own_path(tmp_path: Path) -> None:
    """Before 1.6, torch wrote no archive, which could be mapped."""
    for name, archive in (("pytorch_model.bin", False), ("weights.pt", True)):
        torch.save({"a": torch.arange(4.0)}, tmp_path / name, _use_new_zipfile_serialization=archive)
        with pytest.raises(FormatError, match=f"{name} is a pickle file, which can run code"):
            open_weights(tmp_path / name)
        assert open_weights(tmp_path / name, allow_pickle=True).read("a").tolist() == [0, 1, 2, 3]
    assert list(open_weights(tmp_path, allow_pickle=True).infos) == ["a"]


def test_safetensors_win_over_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path, allow_pickle=True).read("a").tolist() == [1]


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    torch.save({"a": torch.zeros(1), "b": Harmful(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path, allow_pickle=True)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_broken_pickle_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, {"model": {"a": torch.zeros(1)}}])
def test_a_pickle_of_something_else_is_a_format_error(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "nothing-of-this-name"])
def test_a_hub_id_that_cannot_be_fetched(name: str) -> None:
    with pytest.raises(FormatError, match=f"{name} is neither a folder here nor a model"):
        open_weights(name)


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such/folder", "a folder", "org/model@rev"])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        open_weights(path)
    with pytest.raises(FormatError, match="does not exist"):
        open_weights(Path("org/model"))


def test_a_revision_belongs_to_hub_ids(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="`revision` belongs to hub ids"):
        open_weights(tmp_path, revision="main")
    assert resolve_folder(tmp_path) == tmp_path


def test_a_hub_id_is_fetched_with_its_revision_and_without_pickle_or_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_weights("org/model", revision="v1")
    assert source.read("a").tolist() == [1, 1]
    assert source.label == "org/model"
    assert (asked["name"], asked["revision"]) == ("org/model", "v1")
    assert not any(pattern in ("*.bin", "*.py", "*") for pattern in asked["allow_patterns"])
