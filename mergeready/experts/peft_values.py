"""Whether the values in a PEFT configuration are of the kind that their fields ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_REPEATS = 3
_REPEATED = re.compile(r"(?<!\\)(?:[*+]|\{\d)")


def malformed_values(fields: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values that rank, scaling and trained rows are computed from.

    Patterns are regular expressions that a stranger wrote, and some of those take for ever to match: no repeated
    groups are taken, and no more than three repeats.

    >>> list(malformed_values({"lora_alpha": 16, "r": 8, "rank_pattern": {"q_proj": 4}}))
    []
    >>> list(malformed_values({"lora_alpha": 0, "r": 2.5}))
    ['`lora_alpha` is 0, not a finite number other than 0', '`r` is 2.5, not a positive whole number']
    """
    if "lora_alpha" in fields and not _is_alpha(fields["lora_alpha"]):
        yield f"`lora_alpha` is {_shown(fields['lora_alpha'])}, not a finite number other than 0"
    if "r" in fields and not _is_rank(fields["r"]):
        yield f"`r` is {_shown(fields['r'])}, not a positive whole number"
    yield from _pattern_problems("alpha_pattern", fields, _is_alpha)
    yield from _pattern_problems("rank_pattern", fields, _is_rank)
    name = fields.get("base_model_name_or_path")
    if not isinstance(name, str | None):
        yield f"`base_model_name_or_path` is {_shown(name)}, not a text"
    parameters = fields.get("target_parameters")
    if not isinstance(parameters, list | tuple | set | None):
        yield f"`target_parameters` is {_shown(parameters)}, not a list"
    indices = fields.get("trainable_token_indices")
    for rows in indices.values() if isinstance(indices, Mapping) else (indices or [],):
        if not isinstance(rows, list | tuple) or not all(_is_index(row) for row in rows):
            yield f"`trainable_token_indices` holds {_shown(rows)}, not row numbers"


def _pattern_problems(key: str, fields: Mapping[str, Any], fits: Any) -> Iterator[str]:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, Mapping):
        yield f"`{key}` is {_shown(patterns)}, not an object"
        return
    for pattern, value in patterns.items():
        if not fits(value):
            yield f"`{key}` gives {_shown(pattern)} the value {_shown(value)}"
        if key == "alpha_pattern" and not _is_safe(pattern):
            yield f"`{key}` has {_shown(pattern)}, which is no regular expression that is quick to match"


def _is_safe(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return not re.search(r"(?<!\\)\)[*+{]", pattern) and len(_REPEATED.findall(pattern)) <= _MOST_REPEATS


def _is_alpha(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value != 0 and abs(value) < 1e30


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
