from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from mergeready.errors import OptionError, listing
from mergeready.training.techniques.technique import Technique

_TECHNIQUES: dict[str, type[Technique]] = {}
_T = TypeVar("_T", bound=type[Technique])

TechniqueLike: TypeAlias = Technique | str | Mapping[str, Mapping[str, Any]]
"""A technique, its name, or ``{name: settings}`` as settings files have it."""


def register(technique: _T) -> _T:
    """Make a technique known under its name. Use as a class decorator."""
    if technique.name in _TECHNIQUES:
        raise OptionError(f"a technique named {technique.name!r} exists already.")
    _TECHNIQUES[technique.name] = technique
    return technique


def technique_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TECHNIQUES)


def technique_class(name: str) -> type[Technique]:
    """The class behind a name.

    Raises:
        OptionError: If there is none; the message lists all names.
    """
    if name not in _TECHNIQUES:
        raise OptionError(f"there is no technique {name!r}; known are {', '.join(technique_names())}.")
    return _TECHNIQUES[name]


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
    chosen: Any = technique_class(name)
    known = {field.name: field for field in dataclasses.fields(chosen)}
    unknown = [key for key in settings or {} if key not in known]
    if unknown:
        raise OptionError(f"{name} has no setting {listing(unknown)}; it has {', '.join(known) or 'none'}.")
    missing = dataclasses.MISSING
    needed = [
        key
        for key, field in known.items()
        if field.default is missing and field.default_factory is missing and key not in (settings or {})
    ]
    if needed:
        raise OptionError(f"{name} needs {listing(f'`{key}`' for key in needed)}; see its documentation.")
    made: Technique = chosen(**(settings or {}))
    return made
