"""What is wrong with a recipe, in a reader's words: the line, the key, the nearest valid key, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mergeready.recipes.document import Document, Key

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_ABSENT = (*_UNKNOWN, *_MISSING)


def problems(error: ValidationError, document: Document, schema: Mapping[str, Any]) -> list[str]:
    """One sentence a problem.

    Args:
        error: What pydantic found.
        document: What was read.
        schema: JSON schema of what would be right.
    """
    found = [(_key(details, document.content), details) for details in error.errors()]
    keys = [key for key, _ in found]
    sentences = []
    for key, details in found:
        # Where several forms are allowed, pydantic says why each does not fit; the deepest reason is the helpful one.
        if any(len(other) > len(key) and other[: len(key)] == key for other in keys):
            continue
        sentences.append(f"{document.place(key)}: {_sentence(key, details, schema)}")
    return list(dict.fromkeys(sentences))


def _key(details: ErrorDetails, content: Any) -> Key:
    """The place in the document: pydantic's own, without names of types and forms that it puts in between."""
    parts: list[str | int] = []
    location = details["loc"]
    for index, part in enumerate(location):
        if _holds(content, part):
            content = content[part]
        elif index < len(location) - 1 or details["type"] not in _ABSENT:
            continue
        parts.append(part)
    return tuple(parts)


def _holds(content: Any, part: str | int) -> bool:
    if isinstance(content, list):
        return isinstance(part, int) and part < len(content)
    return isinstance(content, Mapping) and part in content


def _sentence(key: Key, details: ErrorDetails, schema: Mapping[str, Any]) -> str:
    name = dotted(key)
    if details["type"] in _UNKNOWN:
        return f"`{name}` is no setting. {_advice(key, schema)}"
    if details["type"] in _MISSING:
        return f"`{name}` is missing. Add it."
    if details["type"] == "union_tag_invalid":
        context = details.get("ctx", {})
        return f"`{name}.kind` must be one of {context.get('expected_tags')}, not {context.get('tag')!r}."
    if details["type"] == "union_tag_not_found":
        return f"`{name}.kind` is missing. Say what kind of task it is."
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    given = details["input"]
    shown = "" if isinstance(given, Mapping | list) else f" (it is {given!r})"
    return f"`{name}`: {message[:1].lower()}{message[1:]}{shown}." if name else f"{message}."


def _advice(key: Key, schema: Mapping[str, Any]) -> str:
    """The nearest valid key, or where this one belongs, or what is allowed here."""
    allowed = sorted({name for node in _nodes(schema, key[:-1]) for name in node.get("properties", {})})
    near = difflib.get_close_matches(str(key[-1]), allowed, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{dotted((*key[:-1], near[0]))}`?"
    elsewhere = [dotted((*path, str(key[-1]))) for path in _homes(schema, str(key[-1]))]
    if elsewhere:
        return f"Did you mean `{elsewhere[0]}`?"
    inside = f"Inside `{dotted(key[:-1])}`, there" if len(key) > 1 else "There"
    return f"{inside} are {', '.join(allowed)}." if allowed else "Remove it."


def dotted(key: Key) -> str:
    """A place as ``--set`` takes it.

    >>> dotted(("mergeready", "peers", 0))
    'mergeready.peers[0]'
    """
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _nodes(schema: Mapping[str, Any], key: Key) -> list[Mapping[str, Any]]:
    """Every schema that may describe the value at a key."""
    nodes = list(_forms(schema, schema))
    for part in key:
        inner: list[Mapping[str, Any]] = []
        for node in nodes:
            value = node.get("items") if isinstance(part, int) else _property(node, part)
            inner += [] if not isinstance(value, Mapping) else list(_forms(value, schema))
        nodes = inner
    return nodes


def _property(node: Mapping[str, Any], name: str) -> Any:
    return node.get("properties", {}).get(name, node.get("additionalProperties"))


def _forms(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema's alternatives, with references followed."""
    if "$ref" in node:
        yield from _forms(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
        return
    yield node
    for form in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _forms(form, schema)


def _homes(schema: Mapping[str, Any], name: str) -> Iterator[Key]:
    """Places of the whole recipe, the shallow ones first, that have a setting of that name."""
    queue: list[Key] = [()]
    while queue:
        key = queue.pop(0)
        for node in _nodes(schema, key):
            properties = node.get("properties", {})
            if name in properties:
                yield key
            if len(key) < 3:
                queue += [(*key, inner) for inner in properties]
