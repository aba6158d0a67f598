from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeVar

from mergeready.errors import OptionError, listing
from mergeready.merging.method import ElementwiseMethod, MergeMethod

_METHODS: dict[str, type[MergeMethod]] = {}
_M = TypeVar("_M", bound=type[MergeMethod])

MethodLike: TypeAlias = str | MergeMethod


def register(method: _M) -> _M:
    """Make a merge method known under its name. Use as a class decorator."""
    if method.name in _METHODS:
        raise OptionError(f"a merge method named {method.name!r} exists already.")
    _METHODS[method.name] = method
    return method


def method_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_METHODS)


def method_class(name: str) -> type[MergeMethod]:
    """The class behind a name.

    Raises:
        OptionError: If there is none; the message lists all names.
    """
    if name not in _METHODS:
        raise OptionError(f"there is no merge method {name!r}; known are {', '.join(method_names())}.")
    return _METHODS[name]


def make_method(method: MethodLike, **parameters: Any) -> MergeMethod:
    """A merge method from its name and parameters; an instance is passed through.

    Raises:
        OptionError: If the name or a parameter is unknown, or a value is out of range.
    """
    if isinstance(method, MergeMethod):
        if parameters:
            raise OptionError(
                f"parameters {listing(parameters)} belong into the {method.name} object itself."
            )
        return method
    chosen = method_class(method)
    known = [f.name for f in dataclasses.fields(chosen)]
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise OptionError(
            f"{method} has no parameter {listing(unknown)}; it has {', '.join(known) if known else 'none'}."
        )
    needed = [f.name for f in dataclasses.fields(chosen) if _is_required(f) and f.name not in parameters]
    if needed:
        raise OptionError(f"{method} needs {listing(f'`{name}`' for name in needed)}; see its documentation.")
    return chosen(**parameters)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def require_fraction(name: str, value: float, *, zero: bool = False) -> None:
    """Check that a parameter is a share between 0 and 1.

    Raises:
        OptionError: If it is outside (0, 1], or [0, 1] with ``zero``.
    """
    if not isinstance(value, int | float) or not (0 <= value <= 1) or (value == 0 and not zero):
        raise OptionError(f"`{name}` must be in {'[' if zero else '('}0, 1], not {value!r}.")


def require_elementwise(name: str, method: str) -> None:
    """Check that a parameter names an elementwise method.

    Raises:
        OptionError: If there is no such method or it needs whole matrices.
    """
    if not issubclass(method_class(method), ElementwiseMethod):
        raise OptionError(f"`{name}` must be an elementwise method, not {method!r}, which needs matrices.")
