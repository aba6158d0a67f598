"""Anything in Python that users name as ``module:function``, in recipes, studies, settings and options."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mergeready.errors import OptionError

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_target(name: str) -> bool:
    r"""Whether a name says ``module:function``, and not a path or hub id.

    >>> is_target("my_task:load"), is_target("org/name"), is_target("C:\\data")
    (True, False, False)
    """
    return _TARGET.fullmatch(name) is not None


def find_target(name: str, key: str) -> Callable[..., Any]:
    """Import a function. Modules are looked up as Python does, and in the working directory.

    Args:
        name: ``module:function``.
        key: The setting or option that names it, for messages.

    Raises:
        OptionError: If there is no such module or function.
    """
    if not is_target(name):
        raise OptionError(f"`{key}` must be module:function, not {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        found = pkgutil.resolve_name(name)
    except ImportError as error:
        raise OptionError(
            f"`{key}` names {name}, but {error}. Modules are looked up where Python is installed and in the working "
            "directory."
        ) from error
    except AttributeError as error:
        raise OptionError(f"`{key}` names {name}, but {module} has no {attribute}.") from error
    if not callable(found):
        raise OptionError(f"`{key}` names {name}, which is no function but a {type(found).__name__}.")
    result: Callable[..., Any] = found
    return result


def call_target(name: str, key: str, arguments: Mapping[str, Any]) -> Any:
    """Import a function and call it.

    Raises:
        OptionError: If there is no such function, or it does not take these arguments.
    """
    function = find_target(name, key)
    try:
        _signature(function).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "no arguments"
        raise OptionError(f"`{key}`: {name} is called with {given}, but {error}.") from error
    return function(**arguments)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:  # some built-in ones do not tell theirs: any arguments are tried
        kinds = {"args": inspect.Parameter.VAR_POSITIONAL, "kwargs": inspect.Parameter.VAR_KEYWORD}
        return inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds.items()])
