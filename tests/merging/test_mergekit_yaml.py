from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergeready.errors import FormatError, OptionError
from mergeready.merging import merge_folders
from mergeready.merging.mergekit_yaml import from_mergekit, to_mergekit
from mergeready.merging.recipe import MergeRecipe, read_recipe
from mergeready.merging.settings import MergeSettings
from tests.merging.worlds import tensors_of

GOLDENS = Path(__file__).parent / "goldens" / "mergekit"
MERGES = yaml.safe_load((GOLDENS / "merges.yaml").read_text())
MODELS = ("base", "expert-0", "expert-1", "expert-2")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(GOLDENS / "results.safetensors").items():
        model, name = key.split("/", 1)
        found.setdefault(model, {})[name] = value
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, results: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        (folder / model).mkdir()
        save_file(results[model], folder / model / "model.safetensors", {"format": "pt"})
    return folder


def run(recipe: MergeRecipe, output: Path) -> dict[str, torch.Tensor]:
    return tensors_of(merge_folders(recipe.base, recipe.experts, output, **recipe.options()))


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("written", [False, True])
def test_the_same_result(
    name: str,
    written: bool,
    results: dict[str, dict[str, torch.Tensor]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read, and read again from what we write of it."""
    monkeypatch.chdir(folder)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(MERGES[name]))
    recipe = read_recipe(tmp_path / "merge.yaml")
    if written:
        if any(key.startswith("^") for key in recipe.overrides):
            with pytest.raises(OptionError, match="is a pattern"):
                to_mergekit(recipe)
            return
        recipe = from_mergekit(yaml.safe_load(to_mergekit(recipe)))
    ours, theirs = run(recipe, tmp_path / "out"), results[name]
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype
        tolerance = 2**-8 if value.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours[tensor], value, rtol=tolerance, atol=1e-6, msg=tensor)


def read(**changes: Any) -> MergeRecipe:
    content: dict[str, Any] = {
        "merge_method": "dare_ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/law", "parameters": {"weight": 1, "density": 0.5}},
            {"model": "org/base+org/code-lora", "parameters": {"weight": 0.25, "density": 0.5}},
        ],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    return from_mergekit({key: value for key, value in (content | changes).items() if value is not None})


def test_everything_is_read() -> None:
    assert read() == MergeRecipe(
        base="org/base",
        experts=("org/law", "org/code-lora"),
        method="dare_ties",
        parameters={"density": 0.5},
        weights=(1.0, 0.25),
        dtype="bfloat16",
    )


def test_dtypes() -> None:
    assert (read(dtype=None).dtype, read(dtype=None).arithmetic) == (None, "float32")
    double = read(dtype="float64", out_dtype="float16")
    assert (double.dtype, double.arithmetic) == ("float16", "float64")


FILTERS = ["self_attn", "mlp", "layers.0"]
SETTING = st.one_of(
    st.floats(0.1, 1),
    st.lists(
        st.fixed_dictionaries({"filter": st.sampled_from(FILTERS), "value": st.floats(0.1, 1)}), max_size=3
    ).map(lambda conditions: [*conditions, {"value": 0.5}]),
)


def theirs(setting: Any, tensor: str) -> float:
    """What mergekit's documentation says of conditions: the first that applies."""
    if isinstance(setting, float):
        return setting
    return next(c["value"] for c in setting if "filter" not in c or c["filter"] in tensor)


@given(weights=st.tuples(SETTING, SETTING), density=SETTING, scale=SETTING)
def test_conditions_hold_for_the_tensors_they_name(
    weights: tuple[Any, Any], density: Any, scale: Any
) -> None:
    recipe = read(
        merge_method="ties",
        models=[{"model": f"org/{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)],
        parameters={"density": density, "lambda": scale},
    )
    settings = MergeSettings.make(
        recipe.method,
        2,
        scale=recipe.scale,
        weights=recipe.weights,
        overrides=recipe.overrides,
        **recipe.parameters,
    )
    for block in ("self_attn.q_proj", "mlp.up_proj", "norm"):
        for layer in (0, 1):
            name = f"model.layers.{layer}.{block}.weight"
            made = settings.at(name)
            assert list(made.weights) == [theirs(weight, name) for weight in weights]
            assert made.method.density == theirs(density, name)  # type: ignore[attr-defined]
            assert made.scale == pytest.approx(theirs(scale, name))


def test_filters_of_what_is_not_there_are_no_mistake(folder: Path, tmp_path: Path) -> None:
    """Nor when both of two occur in no name together, or when the merge is repeated."""
    weight = [{"filter": f, "value": v} for f, v in (("vision_tower", 0.5), ("norm", 0.25))] + [
        {"value": 1.0}
    ]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "expert-0"), "parameters": {"weight": weight}}],
    }
    own = run(from_mergekit(content), tmp_path / "out")
    content["models"] = [{"model": str(folder / "expert-0"), "parameters": {"weight": weight[1:]}}]
    plain = run(from_mergekit(content), tmp_path / "plain")
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], plain[name]) for name in own)
    options = read_recipe(tmp_path / "out" / "mergeready_merge.yaml").options()
    merge_folders(folder / "base", [folder / "expert-0"], tmp_path / "again", **options)
    assert all(torch.equal(value, own[name]) for name, value in tensors_of(tmp_path / "again").items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "karcher"}, "`merge_method: karcher` is not among those that both have"),
        ({"merge_method": "slerp"}, "Theirs turns weights"),
        ({"slices": []}, "`slices`"),
        ({"models": None}, "`models` must be a list"),
        ({"models": [{"model": "org/base"}]}, "nothing beside the base"),
        ({"base_model": None}, "`base_model` is needed"),
        ({"chat_template": "auto", "tokenizer_source": "union"}, "`chat_template`, `tokenizer_source`"),
        ({"dtype": "int8"}, "`dtype: int8`"),
        ({"parameters": {}}, "`normalize: false` (our dare_ties has true)"),
        ({"parameters": {"normalize": True, "rescale": False}}, "`rescale: false` (our dare_ties has true)"),
        ({"parameters": {"normalize": True, "t": 0.5}}, "`t`"),
        (
            {"parameters": {"normalize": True, "lambda": [0.1, 0.9]}},
            "a list of values over layers for `lambda`",
        ),
        ({"models": [{"model": "org/a"}]}, "no `weight` (it is required)"),
        ({"models": [{"model": "org/a", "parameters": {"weight": "much"}}]}, "`weight: much`"),
        ({"models": [{"model": "org/a@v2", "parameters": {"weight": 1}}]}, "the revision in `org/a@v2`"),
        (
            {"models": [{"model": "org/a+org/b", "parameters": {"weight": 1}}]},
            "`org/a+org/b` (its model is not",
        ),
        ({"models": [{"model": "org/a", "layer": 1, "parameters": {"weight": 1}}]}, "`layer` of org/a"),
        (
            {"models": [{"model": f"o/{d}", "parameters": {"weight": 1, "density": d}} for d in (0.1, 0.2)]},
            "`density` that differs between models",
        ),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        read(**changes)


def test_all_of_it_at_once() -> None:
    with pytest.raises(OptionError, match=r"`chat_template`.*`gamma2`.*`rescale: false`"):
        read(chat_template="auto", parameters={"gamma2": 1, "rescale": False})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (MergeRecipe("b", ("e",), "tsv_m"), "mergekit has no method that is our tsv_m"),
        (MergeRecipe("b", ("e", "f"), "slerp", scale=0.5), "mergekit's nuslerp has no scale"),
        (MergeRecipe("b", ("e",), "ties", overrides={"a.*b": {"density": 1}}), "is a pattern"),
        (MergeRecipe("b", ("e",), "ties", overrides={"mlp": {"method": "average"}}), "cannot change method"),
    ],
)
def test_what_mergekit_does_not_have_is_not_written(recipe: MergeRecipe, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        to_mergekit(recipe)


def test_our_defaults_are_written_out() -> None:
    content = yaml.safe_load(to_mergekit(MergeRecipe("b", ("e",), "dare_ties")))
    assert content["parameters"]["density"] == 0.5
    assert content["parameters"]["normalize"] is True


@pytest.mark.parametrize("text", ["a: [", "- 1", "method: ties", ""])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(FormatError, match=r"merge\.yaml"):
        read_recipe(tmp_path / "merge.yaml")
    with pytest.raises(FormatError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
