from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

from mergeready.errors import OptionError, listing
from mergeready.merging.method import ElementwiseMethod, MergeMethod
from mergeready.registry import Registry

_METHODS: Registry[MergeMethod] = Registry("a merge method", "parameter")
_M = TypeVar("_M", bound=type[MergeMethod])

MethodLike: TypeAlias = str | MergeMethod


def register(method: _M) -> _M:
    """Make a merge method known under its name. Use as a class decorator."""
    _METHODS.add(method)
    return method


def method_names() -> list[str]:
    """All registered names, sorted."""
    return _METHODS.names()


def method_class(name: str) -> type[MergeMethod]:
    """The class behind a name.

    Raises:
        OptionError: If there is none; the message lists all names.
    """
    return _METHODS.of(name)


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
    return _METHODS.make(method, parameters)


def require_fraction(name: str, value: float, *, zero: bool = False) -> None:
    """Check that a parameter is a share between 0 and 1.

    Raises:
        OptionError: If it is outside (0, 1], or [0, 1] with ``zero``.
    """
    if not isinstance(value, int | float) or not (0 <= value <= 1) or (value == 0 and not zero):
        raise OptionError(f"`{name}` must be in {'[' if zero else '('}0, 1], not {value!r}.")


def require_elementwise(name: str, method: str) -> None:
    """Check that a parameter names an elementwise method that works with its defaults.

    Raises:
        OptionError: If there is no such method, or it needs whole matrices, or parameters.
    """
    if not issubclass(method_class(method), ElementwiseMethod):
        raise OptionError(f"`{name}` must be an elementwise method, not {method!r}, which needs matrices.")
    make_method(method)
