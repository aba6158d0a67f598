"""Classes that are known by name, and made from a name and settings: merge methods, techniques."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from mergeready.errors import OptionError, listing

T = TypeVar("T")


class Registry(Generic[T]):
    """Dataclasses of one kind by their ``name``.

    Args:
        kind: What they are, with its article, for errors.
        setting: What their fields are called.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Circle:
        ...     name = "circle"
        ...     radius: float
        >>> shapes: Registry[Any] = Registry("a shape", "parameter")
        >>> _ = shapes.add(Circle)
        >>> shapes.make("circle", {"radius": 2.0})
        Circle(radius=2.0)
        >>> shapes.make("circle", {"size": 2.0})
        Traceback (most recent call last):
        mergeready.errors.OptionError: circle has no parameter size; it has radius.
    """

    def __init__(self, kind: str, setting: str) -> None:
        self._kind, self._setting = kind, setting
        self._classes: dict[str, type[T]] = {}

    def add(self, found: type[T]) -> type[T]:
        """Make a class known under its name.

        Raises:
            OptionError: If the name is taken.
        """
        name = str(vars(found)["name"])
        if name in self._classes:
            raise OptionError(f"{self._kind} named {name!r} exists already.")
        self._classes[name] = found
        return found

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)

    def of(self, name: str) -> type[T]:
        """The class behind a name.

        Raises:
            OptionError: If there is none; the message lists all names.
        """
        if name not in self._classes:
            kind = self._kind.partition(" ")[2]
            raise OptionError(f"there is no {kind} {name!r}; known are {', '.join(self.names())}.")
        return self._classes[name]

    def make(self, name: str, settings: Mapping[str, Any]) -> T:
        """An object from its name and settings.

        Raises:
            OptionError: If the name or a setting is unknown, one is missing, or a value is out of range.
        """
        chosen: Any = self.of(name)
        fields = {field.name: field for field in dataclasses.fields(chosen)}
        unknown = [key for key in settings if key not in fields]
        if unknown:
            raise OptionError(
                f"{name} has no {self._setting} {listing(unknown)}; it has {', '.join(fields) or 'none'}."
            )
        needed = [key for key, field in fields.items() if _is_required(field) and key not in settings]
        if needed:
            raise OptionError(f"{name} needs {listing(f'`{key}`' for key in needed)}; see its documentation.")
        made: T = chosen(**settings)
        return made


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
