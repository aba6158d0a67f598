from __future__ import annotations

import copy

import pytest

from mergeready.errors import OptionError
from mergeready.recipes.override import overridden, parse_overrides


def test_values_have_the_types_of_yaml() -> None:
    texts = ["a.b=3", "a.c=1e-4", "d=null", "e=[x, 2]", "f.g.h=true", "i={k: v}", "j=org/name=x"]
    assert parse_overrides(texts) == {
        "a": {"b": 3, "c": 1e-4},
        "d": None,
        "e": ["x", 2],
        "f": {"g": {"h": True}},
        "i": {"k": "v"},
        "j": "org/name=x",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["steps"], "not of the form"),
        (["=3"], "not of the form"),
        (["a..b=3"], "not of the form"),
        (["a=1", "a.b=2"], "sets whole"),
        (["a.b=1", "a.b=2"], "set twice"),
    ],
)
def test_contradictions_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_overrides(texts)


def test_nothing_given_is_changed() -> None:
    content = {"a": {"x": [1]}, "model": "org/base"}
    changes = {"a": {"y": [2]}, "model": {"dtype": "bfloat16"}}
    before = copy.deepcopy((content, changes))
    result = overridden(content, changes)
    assert result == {"a": {"x": [1], "y": [2]}, "model": {"name": "org/base", "dtype": "bfloat16"}}
    result["a"]["x"].append(9)
    assert (content, changes) == before
