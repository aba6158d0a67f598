"""What users import, and the names of the parameters that they pass: a change of either is made on purpose.

python -m tests.test_public_api    # accepts the present state: writes tests/public_api.txt anew
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest

import mergeready
from mergeready.training.options import MonitorOptions

LISTING = Path(__file__).parent / "public_api.txt"
SHELLS = {
    "mergeready.transformers": "MergeReadyCallback",
    "mergeready.lightning": "MergeReadyCallback",
    "mergeready.accelerate": "MergeReadyLoop",
    "mergeready.fabric": "MergeReadyLoop",
}
STARS = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
ACCEPT = (
    "If you want that, run `python -m tests.test_public_api`, commit tests/public_api.txt, tell CHANGELOG.md."
)


def parameters(function: Callable[..., Any]) -> str:
    """Names in order; ``=`` marks those with a default, a lone ``*`` the start of those that need their name."""
    if isinstance(function, type) and issubclass(function, Exception):
        return ""  # raised by us, caught by users
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is Parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in names):
            names.append("*")
        optional = "" if parameter.default is Parameter.empty else "="
        names.append(STARS.get(parameter.kind, "") + parameter.name + optional)
    return f"({', '.join(names)})"


def public_names() -> Iterator[str]:
    """One line a name, then the shells' classes, their methods and the options that all of them take."""
    for name in sorted(mergeready.__all__):
        yield f"mergeready.{name}{parameters(getattr(mergeready, name))}"
    for module, name in SHELLS.items():
        shell = getattr(importlib.import_module(module), name)
        yield f"{module}.{name}{parameters(shell)}"
        own = {key: value for key, value in vars(shell).items() if inspect.isfunction(value)}
        yield from (f"{module}.{name}.{key}{parameters(own[key])}" for key in sorted(own) if key[0] != "_")
    yield from (f"options of shells: {option}" for option in sorted(MonitorOptions.__annotations__))


def differences(listed: list[str], present: list[str]) -> str:
    """Every line that went and every line that came, and how to accept them; nothing if there is none."""
    gone = [f"- {line}" for line in listed if line not in present]
    new = [f"+ {line}" for line in present if line not in listed]
    return "\n".join(["The public API changed:", *gone, *new, ACCEPT]) if gone or new else ""


@pytest.mark.usefixtures("sharing")
def test_the_public_api_is_what_is_listed() -> None:
    changes = differences(LISTING.read_text(encoding="utf-8").splitlines(), list(public_names()))
    assert not changes, changes


def test_all_changes_are_named_with_how_to_accept_them() -> None:
    said = differences(["a.f(x)", "a.g()"], ["a.f(x, y)", "a.g()"])
    assert said.splitlines() == ["The public API changed:", "- a.f(x)", "+ a.f(x, y)", ACCEPT]
    assert differences(["a.g()"], ["a.g()"]) == ""


def test_what_callers_depend_on_is_in_a_line() -> None:
    def function(first: int, second: int = 0, *, third: int, fourth: int = 0, **rest: int) -> None: ...
    def star(*all_of_them: int, named: int) -> None: ...

    assert parameters(function) == "(first, second=, *, third, fourth=, **rest)"
    assert parameters(star) == "(*all_of_them, named)"


if __name__ == "__main__":
    LISTING.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
