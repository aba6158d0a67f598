from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.study import toy

NAME = "mergeready_toy_study"


@pytest.fixture
def study_file(tmp_path: Path) -> Iterator[Path]:
    """The toy study as a file; its target can be imported by name."""
    sys.modules[NAME] = toy
    path = tmp_path / "toy.yaml"
    path.write_text(toy.YAML % NAME, encoding="utf-8")
    yield path
    del sys.modules[NAME]
