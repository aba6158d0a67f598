"""Every recipe and example was run, and what recipes' pages say of that is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.walkthrough import EXAMPLES, RECIPES, RESULT, SHOWN
from benchmarks.walkthrough_pages import END, START, with_measured

ROOT = Path(__file__).parents[2]
CONTENT = json.loads(RESULT.read_text(encoding="utf-8"))


def test_every_recipe_and_example_was_run() -> None:
    assert sorted(SHOWN) == RECIPES
    assert {f"{path} --quick" for path in RECIPES} | set(EXAMPLES) <= set(CONTENT["runs"])


@pytest.mark.parametrize(
    "page", sorted((ROOT / "recipes").glob("*/README.md")), ids=lambda page: page.parent.name
)
def test_pages_of_recipes_hold_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_measured(text, page.parent.name, CONTENT) == text
    assert all((page.parent / f"{name}.svg").is_file() for name in shown_in(page.parent.name))


def shown_in(folder: str) -> list[str]:
    return [Path(path).stem for path in CONTENT["runs"] if path in SHOWN and Path(path).parent.name == folder]


def test_a_page_has_one_place_for_it() -> None:
    for text in ("# Text\n", f"{START}\n{END}\n{START}\n{END}\n"):
        with pytest.raises(ValueError, match="once each"):
            with_measured(text, "text", CONTENT)
