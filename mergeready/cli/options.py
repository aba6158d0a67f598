"""Texts of the command line into values."""

from __future__ import annotations

import re
from typing import Any

from mergeready.errors import OptionError


def parse_parameter(text: str) -> tuple[str, Any]:
    """A parameter's name and value: a number, true or false where it looks like one, else text.

    >>> parse_parameter("density=0.2"), parse_parameter("rest=average")
    (('density', 0.2), ('rest', 'average'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"{text!r} is not of the form name=value.")
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(value.lower(), value)


def parse_numbers(text: str | None) -> list[float] | None:
    """Numbers between commas.

    Raises:
        OptionError: If they are none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{text!r} is not a list of numbers such as 1,0.5.") from error


def parse_bytes(text: str | None) -> int | None:
    """A size in bytes: a number, with a unit if you like.

    Raises:
        OptionError: If it is none, or not positive.

    >>> parse_bytes("500MB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (500000000, 1610612736, 4096)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]) or float(found[1]) == 0:
        raise OptionError(f"{text!r} is not a size such as 500MB or 2GiB.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))


def parse_dtype(text: str | None) -> Any:
    """The torch dtype of a name.

    Raises:
        OptionError: If it is unknown.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text is not None and text not in names:
        raise OptionError(f"`dtype` must be one of {', '.join(names)}, not {text}.")
    return None if text is None else names[text]
