from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from mergeready.errors import OptionError
from mergeready.registry import Registry
from mergeready.training.techniques.technique import Technique

_TECHNIQUES: Registry[Technique] = Registry("a technique", "setting")
_T = TypeVar("_T", bound=type[Technique])

TechniqueLike: TypeAlias = Technique | str | Mapping[str, Mapping[str, Any]]
"""A technique, its name, or ``{name: settings}`` as settings files have it."""


def register(technique: _T) -> _T:
    """Make a technique known under its name. Use as a class decorator."""
    _TECHNIQUES.add(technique)
    return technique


def technique_names() -> list[str]:
    """All registered names, sorted."""
    return _TECHNIQUES.names()


def technique_class(name: str) -> type[Technique]:
    """The class behind a name.

    Raises:
        OptionError: If there is none; the message lists all names.
    """
    return _TECHNIQUES.of(name)


def make_technique(given: TechniqueLike) -> Technique:
    """A technique from its name, or name and settings; an instance is passed through.

    Raises:
        OptionError: If the name or a setting is unknown or missing, or a value is out of range.

    >>> make_technique({"drift_penalty": {"strength": 0.1}}).strength
    0.1
    """
    if isinstance(given, Technique):
        return given
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, Mapping) or len(given) != 1:
        raise OptionError(f"a technique is an object, a name or {{name: settings}}, not {given!r}.")
    [(name, settings)] = given.items()
    return _TECHNIQUES.make(name, settings or {})
