"""What a release says about itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import mergeready

ROOT = Path(__file__).parent.parent


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == mergeready.__version__ == citation["version"]
    assert project["license"] == citation["license"]
