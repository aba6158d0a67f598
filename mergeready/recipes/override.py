"""Changing single settings: ``--set key=value``, a recipe's own quick version, the members of a team."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from mergeready.errors import OptionError
from mergeready.recipes.document import parse_value


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Texts of the form ``key.inner=value`` as nested settings; values are YAML.

    Raises:
        OptionError: If one has another form, or two contradict each other.
        FormatError: If a value is not YAML.

    Example:
        >>> parse_overrides(["optimisation.steps=20", "optimisation.learning_rate=1e-4", "mergeready.peers=[a, b]"])
        {'optimisation': {'steps': 20, 'learning_rate': 0.0001}, 'mergeready': {'peers': ['a', 'b']}}
    """
    made: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise OptionError(f"{text!r} is not of the form key=value, such as optimisation.steps=200.")
        inner = made
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise OptionError(f"{text!r} sets something inside `{name}`, which another one sets whole.")
        if names[-1] in inner:
            raise OptionError(f"`{key.strip()}` is set twice; keep one.")
        inner[names[-1]] = parse_value(value)
    return made


def overridden(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes: mappings are joined, everything else is replaced. Neither argument changes.

    Example:
        >>> overridden({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"x": 5}, "b": [2, 3]})
        {'a': {'x': 5, 'y': 2}, 'b': [2, 3]}
        >>> overridden({"model": "org/base"}, {"model": {"with": {"size": 2}}})
        {'model': {'name': 'org/base', 'with': {'size': 2}}}
    """
    result = copy.deepcopy(dict(content))
    for name, value in changes.items():
        old = result.get(name)
        if isinstance(value, Mapping) and isinstance(old, str) and "name" not in value and name in _NAMED:
            old = {"name": old}  # `model: org/name` is short for `model: {name: org/name}`
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[name] = overridden(old, value)
        else:
            result[name] = copy.deepcopy(value)
    return result


_NAMED = frozenset({"model", "data", "evaluation"})
