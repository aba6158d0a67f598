from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergeready.merging import merge_folders
from mergeready.merging.journal import Finished
from mergeready.merging.parameter import add_delta
from mergeready.merging.rounding import RoundingLoss, rounded
from tests.merging.worlds import World, make_world, state, tensors_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_loss_is_that_of_the_stored_result(world: World, tmp_path: Path) -> None:
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=0.3, dtype=torch.bfloat16)
    base, experts = state(world.base), [state(expert) for expert in world.experts]
    errors, changes = {}, {}
    for name, merged in tensors_of(out).items():
        change = 0.3 * sum(expert[name].double() - base[name].double() for expert in experts)
        errors[name] = float((merged.double() - base[name].double() - change).norm())
        changes[name] = float(change.norm())
    total = torch.tensor(list(errors.values())).norm() / torch.tensor(list(changes.values())).norm()
    record = json.loads((out / "mergeready.json").read_text())["rounding"]
    assert record["dtype"] == "bfloat16"
    assert record["total"] == pytest.approx(float(total), rel=1e-3)
    assert record["total"] > 0.01
    shares = sorted(((errors[n] / changes[n], n) for n in errors), reverse=True)
    assert list(record["worst"]) == [name for _, name in shares[:5]]
    assert list(record["worst"].values()) == pytest.approx([share for share, _ in shares[:5]], rel=1e-3)


def test_fp32_loses_next_to_nothing(world: World, tmp_path: Path) -> None:
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out")
    assert json.loads((out / "mergeready.json").read_text())["rounding"]["total"] < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_values_are_those_of_every_engine(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.randn(2, 1000, generator=generator)
    kept = base.clone()
    merged, change, error = rounded(base, delta.clone(), scale, dtype)
    assert torch.equal(merged, add_delta(base, delta, scale, dtype))
    moved = merged.double() - base.double() - scale * delta.double()
    assert change == pytest.approx(float((scale * delta.double()).square().sum()), rel=1e-5)
    assert error == pytest.approx(float(moved.square().sum()), rel=1e-2, abs=1e-10)
    assert torch.equal(base, kept)


def test_nothing_merged_is_nothing_lost() -> None:
    assert RoundingLoss.of([Finished("a")], []) == RoundingLoss("", 0.0, {})
