"""The page of frameworks is what its data say, and the tests that it names exist."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def frameworks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frameworks", ROOT / "docs/_frameworks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exists(test: str) -> bool:
    path, *names = test.split("::")
    if not names or not (ROOT / path).is_file():
        return False
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        found = [
            node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        ]
        if not found:
            return False
        body = found[0].body
    return True


def test_every_test_that_it_names_exists(frameworks: ModuleType) -> None:
    tests = frameworks.test_ids(frameworks.load())
    assert len(tests) > 40
    assert [test for test in tests if not exists(test)] == []


def test_the_page_is_up_to_date(frameworks: ModuleType) -> None:
    assert (ROOT / "docs/frameworks.md").read_text("utf-8") == frameworks.page(frameworks.load()), (
        "run `python docs/_frameworks.py`"
    )


@pytest.mark.parametrize(
    "test", ["tests/nowhere.py::test_a", "tests/test_trl.py::test_nothing", "tests/test_trl.py"]
)
def test_a_missing_test_is_noticed(test: str) -> None:
    assert not exists(test)
