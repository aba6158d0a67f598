from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergeready.merging import merge_folders
from mergeready.merging.journal import Finished
from mergeready.merging.rounding import RoundingLoss, rounding_sums
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


def test_the_result_is_not_touched() -> None:
    base, delta = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    merged = torch.tensor([1.25, 2.125])
    assert rounding_sums(base, delta, 0.5, merged) == (0.078125, 0.0)
    assert merged.tolist() == [1.25, 2.125]
    assert delta.tolist() == [0.5, 0.25]
    assert base.tolist() == [1.0, 2.0]


def test_a_part_of_a_long_piece_stands_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.randn(2**18, generator=generator), 1e-3 * torch.randn(2**18, generator=generator)
    merged = (base + delta).bfloat16()
    error = merged.double() - base.double() - delta.double()
    whole = float(delta.double().norm() ** 2), float(error.norm() ** 2)
    assert rounding_sums(base, delta, 1.0, merged) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("row", [0, 100, 255])
def test_a_long_piece_that_changes_in_one_row_is_seen(row: int) -> None:
    """As where only some tokens were trained."""
    delta = torch.zeros(256, 1024)
    delta[row] = 1e-3 * torch.randn(1024, generator=torch.Generator().manual_seed(0))
    flat = delta.reshape(-1)
    change, error = rounding_sums(torch.ones_like(flat), flat, 1.0, torch.ones_like(flat).bfloat16())
    assert change == pytest.approx(float(delta.norm() ** 2), rel=0.5)
    assert error == pytest.approx(change)  # nothing is left of so small a change


def test_nothing_merged_is_nothing_lost() -> None:
    assert RoundingLoss.of([Finished("a")], []) == RoundingLoss("", 0.0, {})
