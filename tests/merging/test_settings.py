from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeready.errors import OptionError
from mergeready.merging import MergedInPlace, merge, merge_folders
from mergeready.merging.settings import MergeSettings
from tests.merging.worlds import equal, make_world, tensors_of

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
