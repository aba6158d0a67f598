from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from mergeready.errors import OptionError
from mergeready.merging import ElementwiseMethod, make_method, merge_folders, method_class, method_names
from tests.merging.worlds import World, make_world, summed, tensors_of

WEIGHTS = [0.3, 0.7, -0.2, 1.1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    world.experts *= 2
    return world


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_sums_are_rounded_once(world: World, tmp_path: Path, method: str) -> None:
    """fp32 weights near each other have exact fp32 differences, so everything but the last rounding is float64."""
    weights = [w / sum(WEIGHTS) for w in WEIGHTS] if method == "average" else WEIGHTS
    exact = summed(world.base, world.experts, weights, 0.37)
    errors = {}
    for arithmetic in ("float32", "float64"):
        out = merge_folders(
            world.base_folder,
            world.experts,
            tmp_path / arithmetic,
            method,
            weights=WEIGHTS,
            scale=0.37,
            arithmetic=arithmetic,
        )
        wrong = [(t != exact[n].float()).float().mean() for n, t in tensors_of(out).items()]
        errors[arithmetic] = float(torch.stack(wrong).mean())
    # The differences of fp32 weights that are not within a factor of two of each other are inexact.
    assert errors["float64"] < 0.01 < 0.05 < errors["float32"]


def elementwise() -> list[str]:
    """All elementwise methods that need nothing but deltas."""
    kinds = {name: method_class(name) for name in method_names()}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, ElementwiseMethod)
        and not any(f.default is MISSING and f.default_factory is MISSING for f in fields(kind))
    ]


@pytest.mark.parametrize("method", elementwise())
def test_every_method_gives_nearly_the_same(world: World, tmp_path: Path, method: str) -> None:
    made = make_method(method)
    experts = world.experts[:2]  # what some methods are for
    single = merge_folders(world.base_folder, experts, tmp_path / "single", made)
    double = merge_folders(world.base_folder, experts, tmp_path / "double", made, arithmetic="float64")
    a, b = tensors_of(single), tensors_of(double)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_cannot_be_had_is_refused(world: World, tmp_path: Path) -> None:
    for method, arithmetic, message in (
        ("tsv_m", "float64", "tsv_m decompose matrices in float32"),
        ("average", "float16", "`arithmetic` must be float32 or float64, not 'float16'"),
    ):
        with pytest.raises(OptionError, match=message):
            merge_folders(world.base_folder, world.experts, tmp_path / "out", method, arithmetic=arithmetic)
    with pytest.raises(OptionError, match="tsv_m"):
        merge_folders(
            world.base_folder,
            world.experts,
            tmp_path / "out",
            overrides={"query": {"method": "tsv_m"}},
            arithmetic="float64",
        )
