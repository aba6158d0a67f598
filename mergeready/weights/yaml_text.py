"""YAML from files that others made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergeready.errors import FormatError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50
MAX_ALIASES = 100
"""No recipe or card comes near these; texts that do are made to exhaust whoever reads them."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says; see :func:`parse_yaml`.

    Raises:
        FormatError: Also if it cannot be read, or is no text in UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}).") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text says: plain values, lists and mappings, never objects.

    Args:
        text: The text.
        name: What to call it in an error.

    Raises:
        FormatError: If it is no YAML, longer than a million characters, nested more than 50 deep, or refers back to
            itself more than 100 times.

    Example:
        >>> parse_yaml("tags: [a, b]", "card")
        {'tags': ['a', 'b']}
    """
    if len(text) > MAX_CHARACTERS:
        raise FormatError(f"{name} is longer than {MAX_CHARACTERS:,} characters; what is ours never is.")
    try:
        _require_modest(text, name)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a safe one
    except (yaml.YAMLError, ValueError) as error:
        raise FormatError(f"{name} is not YAML ({error}).") from error


def _require_modest(text: str, name: str) -> None:
    """Stop at the first event beyond a limit, before anything is built."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MAX_DEPTH:
            raise FormatError(f"{name} is nested more than {MAX_DEPTH} levels deep.")
        if aliases > MAX_ALIASES:
            raise FormatError(f"{name} refers back to parts of itself more than {MAX_ALIASES} times.")
