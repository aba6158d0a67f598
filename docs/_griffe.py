"""Shows the package's doctests as code, which griffe knows only in ``Examples:``, and the defaults of attributes."""

from __future__ import annotations

import re
from typing import Any

import griffe

BARE = re.compile(r"^>>> .*(?:\n(?!$).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Renames sections with one example, and makes one of each example that stands in the text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        if isinstance(obj, griffe.Class):
            text = _with_defaults(text, obj)
        obj.docstring.value = BARE.sub(lambda found: f"Examples:\n{_indented(found[0])}", text)


def _with_defaults(text: str, cls: griffe.Class) -> str:
    """A class's text with the default of every attribute that has one, at the end of what is said about it."""
    head, section, rest = text.partition("\nAttributes:\n")
    body, blank, tail = rest.partition("\n\n")

    def told(found: re.Match[str]) -> str:
        value = _default(cls, found[1])
        if value is None or "(" in value or value in {"None", "..."} or value.isupper():  # what says nothing
            return found[0]
        return f"{found[0].rstrip()} Default: `{value}`."

    body = re.sub(r"^    (\w+):.*(?:\n     +.*)*", told, body, flags=re.MULTILINE)
    return head + section + body + blank + tail


def _default(cls: griffe.Class, name: str) -> str | None:
    """What an attribute is unless given, as the source has it; also of a base class in the same module."""
    member = cls.members.get(name)
    if member is not None:
        value = getattr(member, "value", None)
        return None if value is None else str(value)
    parents = [cls.parent.members.get(str(base)) for base in cls.bases] if cls.parent else []
    known = (_default(parent, name) for parent in parents if isinstance(parent, griffe.Class))
    return next((value for value in known if value is not None), None)


def _indented(block: str) -> str:
    return "\n".join(f"    {line}" for line in block.split("\n"))
