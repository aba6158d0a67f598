from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeready.errors import BaseMismatchError, FormatError, OptionError
from mergeready.experts import Base
from mergeready.merging import make_method, merge
from mergeready.merging.information import Collected, Information

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}


def base(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(2, 3, generator=generator),
        "b.weight": torch.randn(4, generator=generator),
    }


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    identity = Base.open(base(0)).identity
    path = Collected(TENSORS, "fisher", identity, {"examples": 7}).save(tmp_path / "new" / "f.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["f.safetensors"]
    assert {n: t.tolist() for n, t in load_file(path).items()} == {n: t.tolist() for n, t in TENSORS.items()}
    opened = Information.open(path, "fisher")
    assert torch.equal(opened.read(0, "a.weight"), TENSORS["a.weight"])
    assert torch.equal(opened.read_flat(0, "a.weight", 2, 5), torch.tensor([2.0, 3.0, 4.0]))
    assert opened.shape(0, "a.weight") == (2, 3)
    assert opened.shape(0, "c") is None


def test_tensors_that_share_memory_are_all_there(tmp_path: Path) -> None:
    shared = torch.eye(3)
    collected = Collected({"q": shared, "k": shared}, "input_grams")
    path = collected.save(tmp_path / "g.safetensors")
    for source in (collected, path):
        opened = Information.open([source], "input_grams")
        assert torch.equal(opened.read(0, "q"), shared)
        assert torch.equal(opened.read(0, "k"), shared)


def test_equal_contents_are_equal(tmp_path: Path) -> None:
    path = Collected(TENSORS, "fisher").save(tmp_path / "f.safetensors")
    a, b = Information.open([TENSORS], "fisher"), Information.open([path], "fisher")
    assert a == b
    assert hash(a) == hash(b)
    assert a != Information.open([{**TENSORS, "b.weight": torch.zeros(4)}], "fisher")
    assert Information.open(a, "fisher") is a


def test_a_description_opens_the_same_files_and_no_others(tmp_path: Path) -> None:
    path = Collected(TENSORS, "fisher").save(tmp_path / "f.safetensors")
    opened = Information.open([path], "fisher")
    described = json.loads(json.dumps(opened.describe()))
    assert Information.open(described, "fisher") == opened
    Collected({**TENSORS, "b.weight": torch.zeros(4)}, "fisher").save(path)
    with pytest.raises(FormatError, match=r"f\.safetensors is not the file that this merge was made with"):
        Information.open(described, "fisher")
    in_memory = Information.open([TENSORS], "fisher").describe()
    with pytest.raises(OptionError, match="was in memory when this merge was described"):
        Information.open(in_memory, "fisher")


def test_information_about_an_expert_of_another_base_is_refused(tmp_path: Path) -> None:
    identity = Base.open(base(1)).identity
    fishers = [Collected(TENSORS, "fisher", identity).save(tmp_path / "f.safetensors")]
    expert = {name: tensor + 0.01 for name, tensor in base(0).items()}
    with pytest.raises(BaseMismatchError, match=r"f\.safetensors was made for"):
        merge(base(0), [expert], "fisher", fisher=fishers)
    merge(base(1), [{n: t + 0.01 for n, t in base(1).items()}], "fisher", fisher=fishers)


def test_information_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = Collected(TENSORS, "fisher").save(tmp_path / "f.safetensors")
    for source in (path, Collected(TENSORS, "fisher")):
        with pytest.raises(OptionError, match="holds fisher, where input_grams is needed"):
            make_method("regmean", grams=[source])


@pytest.mark.parametrize("record", ["{", "[]", '{"kind": "fisher"}', '{"kind": "hessian", "base": null}'])
def test_records_that_cannot_be_read_are_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "f.safetensors"
    save_file(TENSORS, path, {"mergeready": record})
    with pytest.raises(FormatError, match=r"f\.safetensors"):
        make_method("fisher", fisher=[path])


def test_files_of_others_need_no_record(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "f.safetensors")
    assert make_method("fisher", fisher=str(tmp_path / "f.safetensors")).describe()["fisher"][0]["path"]
