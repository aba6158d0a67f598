"""Shows the package's doctests as code: griffe knows them only in a section called ``Examples:``."""

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
        obj.docstring.value = BARE.sub(lambda found: f"Examples:\n{_indented(found[0])}", text)


def _indented(block: str) -> str:
    return "\n".join(f"    {line}" for line in block.split("\n"))
