from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from mergeready.errors import FormatError
from mergeready.experts import Base, open_expert
from mergeready.merging import merge_folders
from mergeready.merging.provenance import is_hub_id, public, public_name
from mergeready.merging.recipe import read_recipe
from tests.merging.worlds import World, equal, make_world, state, tensors_of

OPTIONS: dict[str, Any] = {
    "method": "dare_ties",
    "density": 0.25,
    "seed": 4,
    "scale": 0.5,
    "weights": [1, 2],
    "overrides": {"query|key": {"method": "average", "scale": 0.3}, r"LayerNorm\.": {"density": 0.9}},
    "dtype": torch.bfloat16,
    "arithmetic": "float64",
    "statistics": "average",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def out(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_folders(
        world.base_folder,
        [world.folders[0], world.adapter_folder],
        tmp_path_factory.mktemp("out") / "out",
        **OPTIONS,
    )


def test_the_recipe_repeats_the_merge(
    world: World, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    recipe = read_recipe(out / "mergeready_merge.yaml")
    assert (recipe.base, recipe.experts) == ("base", ("expert-0", "adapter"))
    again = merge_folders(recipe.base, recipe.experts, tmp_path / "again", **recipe.options())
    for path in out.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 3.0, "overides": {}}, r"does not know: `overides`, `scale`.*below `merge`"),
        ({"merge": {"method": "ties", "scale": 1, "weights": [1, 1], "overrides": [1]}}, "not a recipe"),
    ],
)
def test_a_recipe_edited_wrongly_is_refused(
    out: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = yaml.safe_load((out / "mergeready_merge.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | changes))
    with pytest.raises(FormatError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_the_recipe_tells_inputs_apart(world: World, out: Path, tmp_path: Path) -> None:
    own = shutil.copytree(world.root, tmp_path / "own")
    changed = bytearray((own / "expert-1" / "model.safetensors").read_bytes())
    changed[-7] ^= 1
    (own / "expert-1" / "model.safetensors").write_bytes(changed)

    def recipe(folder: Path, name: str) -> Any:
        made = merge_folders(folder / "base", [folder / "expert-0", folder / "expert-1"], tmp_path / name)
        return yaml.safe_load((made / "mergeready_merge.yaml").read_text())

    here, there = recipe(world.root, "here"), recipe(own, "there")
    assert here["base"] == there["base"]
    assert here["experts"][0] == there["experts"][0]
    assert here["experts"][1] != there["experts"][1]
    assert list(here["experts"][1]["files"]) == ["model.safetensors"]


def test_no_path_of_this_machine_is_told(world: World, out: Path) -> None:
    for path in out.iterdir():
        assert str(world.root).encode() not in path.read_bytes(), path.name


def test_local_models_are_no_base_model_of_the_hub(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {"tags": ["merge", "mergeready"]}
    for word in ("dare_ties", "density | 0.25", "expert-0 | full | 1", "adapter | peft | 2", "bfloat16 lost"):
        assert word in card.text
    assert r"query\|key" in card.text


def test_hub_ids_are_named_for_the_hub(world: World, tmp_path: Path) -> None:
    base = Base.open(world.base)
    base.source.label = "org/base"
    experts = [open_expert(state(expert), base) for expert in world.experts]
    named = [type(expert)(**vars(expert) | {"label": f"org/{i}"}) for i, expert in enumerate(experts)]
    out = merge_folders(base, named, tmp_path / "out")
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data == {
        "base_model": ["org/base", "org/0", "org/1"],
        "base_model_relation": "merge",
        "tags": ["merge", "mergeready"],
    }


def test_bases_may_lie_in_memory(world: World, tmp_path: Path) -> None:
    out = merge_folders(state(world.base), world.experts, tmp_path / "out")
    content = yaml.safe_load((out / "mergeready_merge.yaml").read_text())
    assert content["base"]["label"] == "state dict"
    assert content["experts"][0]["files"] == {}
    assert equal(tensors_of(out), tensors_of(merge_folders(world.base_folder, world.folders, tmp_path / "b")))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert is_hub_id("org/base")
    assert not is_hub_id("models/base")
    assert [public_name(n) for n in ("org/base", "models/base", "/a/b/c", "../x", "gpt2")] == [
        "org/base",
        "base",
        "c",
        "x",
        "gpt2",
    ]
    monkeypatch.chdir(tmp_path / "models")
    assert (public_name("."), public_name("base/..")) == ("models", "models")
    assert public({"a": ["/x/y.safetensors", 1, "ties"], "b": Path("/p/q")}) == {
        "a": ["y.safetensors", 1, "ties"],
        "b": "q",
    }
