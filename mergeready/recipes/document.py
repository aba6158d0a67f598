"""YAML with the line of every key, so that errors can point at it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from mergeready.errors import FormatError

Key: TypeAlias = tuple[str | int, ...]
"""Where a value is: keys of mappings and positions in lists, from the top."""


class _Loader(yaml.SafeLoader):
    """Plain YAML 1.1, in which ``1e-4`` is a number as well and not a text, and a key ``on`` is no truth value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """What a YAML file holds.

    Attributes:
        content: The values by name.
        lines: The line, from 1, of every key and list entry.
        label: What messages call the file.
    """

    content: dict[str, Any]
    lines: Mapping[Key, int] = field(default_factory=dict)
    label: str = "the recipe"

    def place(self, key: Key) -> str:
        """The file, and the line of a key or of what it is in.

        >>> Document({"a": 1}, {("a",): 7}, "run.yaml").place(("a", "b"))
        'run.yaml, line 7'
        """
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.label}, line {self.lines[key]}" if key else self.label


def read_document(path: str | Path) -> Document:
    """Read a YAML file that holds settings by name.

    Raises:
        FormatError: If it cannot be read, holds something else, or gives a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}).") from error
    return parse_document(text, str(path))


def parse_document(text: str, label: str = "the recipe") -> Document:
    r"""Read YAML that holds settings by name.

    Raises:
        FormatError: As :func:`read_document`.

    Example:
        >>> document = parse_document("optimisation:\n  learning_rate: 1e-4  # small\n")
        >>> document.content, document.lines[("optimisation", "learning_rate")]
        ({'optimisation': {'learning_rate': 0.0001}}, 2)
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{label} is not YAML: {error}") from error
    finally:
        loader.dispose()
    if node is None or not isinstance(content, dict):
        raise FormatError(f"{label} must hold settings by name, such as `model: org/name`.")
    lines: dict[Key, int] = {}
    _note_lines(node, (), lines, label)
    return Document(content, lines, label)


def parse_value(text: str) -> Any:
    """A value as YAML reads it.

    Raises:
        FormatError: If it is not YAML.

    >>> parse_value("1e-4"), parse_value("[a, b]"), parse_value("none"), parse_value("null")
    (0.0001, ['a', 'b'], 'none', None)
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{text!r} is not a YAML value ({error}).") from error


def _note_lines(node: yaml.Node, key: Key, lines: dict[Key, int], label: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, str(name.value))
            if inner in lines and name.tag != "tag:yaml.org,2002:merge":
                raise FormatError(
                    f"{label}, line {name.start_mark.line + 1}: `{name.value}` is given twice; the first is in "
                    f"line {lines[inner]}. Keep one."
                )
            lines[inner] = name.start_mark.line + 1
            _note_lines(value, inner, lines, label)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*key, index)] = value.start_mark.line + 1
            _note_lines(value, (*key, index), lines, label)
