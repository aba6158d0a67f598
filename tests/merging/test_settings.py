from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeready.errors import OptionError
from mergeready.merging import MergedInPlace, merge, merge_adapters, merge_folders
from mergeready.merging.recipe import read_recipe
from mergeready.merging.settings import MergeSettings
from tests.merging.worlds import equal, make_world, tensors_of
from tests.models import perturb, tiny_gpt2

OVERRIDES = {
    "embeddings": {"scale": 0.5},
    "attention": {"density": 0.5},
    r"output\.dense": {"method": "average", "weights": [2.0, 1.0]},
}


def test_the_first_match_counts() -> None:
    made = MergeSettings.make("ties", 1, overrides={"a": {"density": 0.5}, "ab": {"density": 0.9}})
    assert made.at("ab").method.describe() == {"method": "ties", "density": 0.5}
    assert made.at("x").method.describe() == {"method": "ties", "density": 0.2}


def test_an_override_keeps_the_other_parameters() -> None:
    made = MergeSettings.make("dare_ties", 2, density=0.3, seed=7, overrides={"a": {"density": 0.5}})
    assert made.at("a").method.describe() == {"method": "dare_ties", "density": 0.5, "seed": 7}


def test_scales_multiply_also_when_the_merge_is_rescaled() -> None:
    made = MergeSettings.make("average", 2, scale=0.5, overrides={"a": {"scale": 3.0}})
    assert (made.at("a").scale, made.at("b").scale) == (1.5, 0.5)
    assert (made.with_scale(2.0).at("a").scale, made.with_scale(2.0).at("b").scale) == (6.0, 2.0)


def test_another_method_starts_from_its_defaults() -> None:
    made = MergeSettings.make("ties", 2, density=0.7, overrides={"a": {"method": "dare_ties"}})
    assert made.at("a").method.describe() == {"method": "dare_ties", "density": 0.5, "seed": 0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"(": {}}, "regular expression"),
        ({"a": {"densty": 1}}, "densty"),
        ({"a": {"density": 2}}, "density"),
        ({"a": {"weights": [1.0]}}, "weights"),
        ({"a": {"scale": float("nan")}}, "scale"),
        ({"a": {"method": "nothing"}}, "nothing"),
        ({"a": {"scale": "1e-1"}}, "`scale` must be numeric"),
        ({"a": 0.5}, "'a' must map settings to values, not be 0.5"),
        ({"a": {"required": "no"}}, "`required` of the override 'a' must be true or false, not 'no'"),
    ],
)
def test_bad_overrides_are_refused(override: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MergeSettings.make("ties", 2, overrides=override)


def test_all_engines_obey(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    options = {"method": "ties", "scale": 0.7, "weights": [1.0, 0.5], "overrides": OVERRIDES}
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", **options)
    written = tensors_of(out)
    state = merge({k: v.clone() for k, v in tensors_of(world.base_folder).items()}, world.folders, **options)
    assert equal(state, written)
    with MergedInPlace(world.experts[0], world.base_folder, world.folders[1:], **options) as merged:
        assert equal(
            {n: t.detach().clone() for n, t in merged.live.targets.items()},
            {n: written[n] for n in merged.live.targets},
        )
    plain = merge_folders(
        world.base_folder, world.folders, tmp_path / "plain", "ties", scale=0.7, weights=[1.0, 0.5]
    )
    changed = {n for n, t in tensors_of(plain).items() if not torch.equal(t, written[n])}
    expected = {n for n in written if "embeddings" in n or "attention" in n or "output.dense" in n}
    assert changed == expected


def test_an_override_that_matches_nothing_is_refused_by_all_engines(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    state = {k: v.clone() for k, v in tensors_of(world.base_folder).items()}
    options = {"overrides": {"attention": {"scale": 0.5}, "atention": {"scale": 0.3}}}
    message = r"match no parameter of .*: 'atention'\. .*on names such as bert\.\S+, bert"
    for base in (state, world.base):
        with pytest.raises(OptionError, match=message):
            merge(base, world.folders, **options)
    with pytest.raises(OptionError, match=message):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", **options)
    with pytest.raises(OptionError, match=message):
        merge_adapters(world.base_folder, [world.adapter_folder], tmp_path / "out", **options)
    with pytest.raises(OptionError, match=message):
        MergedInPlace(world.experts[0], world.base_folder, world.folders[1:], **options)
    assert not (tmp_path / "out").exists()


def test_what_is_never_merged_is_no_match() -> None:
    base = {"norm.weight": torch.ones(2), "norm.running_mean": torch.zeros(2)}
    with pytest.raises(OptionError, match="'running_mean'"):
        merge(base, [base], overrides={"running_mean": {"scale": 0.5}})


def test_a_tied_head_is_told_by_which_name_it_goes() -> None:
    with pytest.raises(
        OptionError,
        match=r"lm_head\.weight goes by the name of transformer\.wte\.weight, to which it is tied",
    ):
        merge(tiny_gpt2(), [perturb(tiny_gpt2(), 1)], overrides={"lm_head": {"scale": 0.5}})


def test_an_override_may_be_allowed_to_match_nothing(tmp_path: Path) -> None:
    """Also when the merge is repeated from what it wrote about itself."""
    world = make_world(tmp_path)
    overrides = {
        "adapters": {"scale": 0.5, "required": False},
        "attention": {"scale": 0.5, "required": False},
    }
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", overrides=overrides)
    plain = merge_folders(
        world.base_folder, world.folders, tmp_path / "plain", overrides={"attention": {"scale": 0.5}}
    )
    assert equal(tensors_of(out), tensors_of(plain))
    options = read_recipe(out / "mergeready_merge.yaml").options()
    again = merge_folders(world.base_folder, world.folders, tmp_path / "again", **options)
    assert equal(tensors_of(again), tensors_of(out))
