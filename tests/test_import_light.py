"""Importing is cheap: frameworks load when something needs them, not before."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "transformers",
    "lightning",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "jinja2",
    "typer",
    "huggingface_hub",
)
CODE = "import sys; import {}; print([name for name in {} if name in sys.modules])"
ROOMS = (
    "mergeready.weights, mergeready.experts, mergeready.metrics, mergeready.merging, mergeready.training.loop"
)


def loaded(modules: str, heavy: tuple[str, ...]) -> str:
    code = CODE.format(modules, heavy)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_package_alone_imports_nothing() -> None:
    assert loaded("mergeready", (*HEAVY, "torch", "numpy")) == "[]"


def test_the_rooms_import_no_framework() -> None:
    assert loaded(ROOMS, HEAVY) == "[]"


def test_what_is_loaded_would_be_seen() -> None:
    assert loaded("mergeready.weights", ("torch", "peft", "json")) == "['torch', 'json']"
