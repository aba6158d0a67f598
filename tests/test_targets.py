from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mergeready.errors import OptionError
from mergeready.targets import call_target, find_target


def test_modules_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_module_of_this_folder.py").write_text("def answer(): return 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_target("a_module_of_this_folder:answer", "data")() == 42
    del sys.modules["a_module_of_this_folder"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answer", "`data` must be module:function, not 'answer'"),
        ("a b:c", "must be module:function"),
        ("no_such_module:answer", "names no_such_module:answer, but No module named"),
        ("math:answer", "math has no answer"),
        ("math:pi", "is no function but a float"),
    ],
)
def test_what_is_no_function_is_explained(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_target(name, "data")


def test_arguments_are_checked_before_the_call() -> None:
    with pytest.raises(OptionError, match=r"called with y, but missing .*'x'"):
        call_target("math:sqrt", "data", {"y": 4.0})
    with pytest.raises(OptionError, match="called with no arguments"):
        call_target("math:sqrt", "data", {})
    assert call_target("builtins:dict", "data", {"y": 4.0}) == {"y": 4.0}  # it tells no signature


def test_what_a_function_raises_is_not_taken_for_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="divmod"):
        call_target(f"{__name__}:broken", "data", {})


def broken() -> object:
    return divmod("a", 2)  # type: ignore[operator]  # it shall fail
