"""Experts that are given twice, and bases that are given as experts, by any of their names and forms."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.merging import merge, merge_adapters, merge_folders, merge_plan
from tests.merging.worlds import World, adapted, make_world, state

BASE = {"w": torch.zeros(40, 30), "b": torch.zeros(5)}
LAW = {"w": torch.ones(40, 30), "b": torch.ones(5)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What merging says."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mergeready"):
            function(*arguments, **options)
        return [record.getMessage() for record in caplog.records]

    return call


def test_different_experts_are_no_news(said: Callable[..., list[str]], world: World) -> None:
    assert said(merge_plan, world.base_folder, [*world.folders, world.adapter_folder]) == []


def test_every_later_one_is_named_once(said: Callable[..., list[str]]) -> None:
    copies = [LAW, {**LAW, "b": torch.zeros(5)}, {name: value.clone() for name, value in LAW.items()}, LAW]
    assert said(merge, BASE, copies) == [
        "experts 1 (state dict) and 3 (state dict) are the same, which counts twice",
        "experts 1 (state dict) and 4 (state dict) are the same, which counts twice",
    ]


def test_one_element_makes_a_difference_wherever_it_is(said: Callable[..., list[str]]) -> None:
    for place in (0, 700, 1199):
        other = {name: value.clone() for name, value in LAW.items()}
        other["w"].view(-1)[place] = 2
        alone = {name: value.clone() for name, value in BASE.items()}
        alone["w"].view(-1)[place] = 1
        assert said(merge, BASE, [LAW, other, alone]) == []


def test_the_base_in_any_form(said: Callable[..., list[str]], world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.base_folder, tmp_path / "copy")
    for given in (world.base_folder, copy, world.base, state(world.base)):
        found = said(merge, world.base, [world.folders[0], given], "average")
        assert [text.split(" (")[0] for text in found] == ["expert 2"]
        assert found[0].endswith("changes nothing: it is the base itself, and counts in means all the same")


def test_folders_by_any_of_their_names(said: Callable[..., list[str]], world: World, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(world.folders[0])
    shutil.copytree(world.folders[0], tmp_path / "copy")
    for other in (world.folders[0] / ".." / world.folders[0].name, tmp_path / "link", tmp_path / "copy"):
        out = tmp_path / "out"
        found = said(merge_folders, world.base_folder, [world.folders[0], other], out, overwrite=True)
        assert len(found) == 1
        assert found[0].startswith(f"experts 1 ({world.folders[0]}) and 2 ({other}) are the same")


def test_adapters_of_other_strength_are_others(
    said: Callable[..., list[str]], world: World, tmp_path: Path
) -> None:
    for name, alpha in (("a", 8), ("b", 8), ("c", 16)):
        adapted(world.base, 5, lora_alpha=alpha).save_pretrained(tmp_path / name)
    experts = [tmp_path / name for name in "abc"]
    found = said(merge_adapters, world.base_folder, experts, tmp_path / "out")
    assert found == [
        f"experts 1 ({tmp_path / 'a'}) and 2 ({tmp_path / 'b'}) are the same, which counts twice"
    ]
