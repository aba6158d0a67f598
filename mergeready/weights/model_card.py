"""A model card is a person's text: ours is one marked section of it and a few fields of its metadata, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergeready.errors import FormatError
from mergeready.weights.atomic import new_file
from mergeready.weights.yaml_text import parse_yaml

CARD_NAME = "README.md"
BEGIN, END = "<!-- mergeready:begin -->", "<!-- mergeready:end -->"
_ADDED_TO = "tags"
# As the hub reads it, which looks past empty lines and a byte order mark.
_METADATA = re.compile(
    r"\A(?P<before>\ufeff?\s*)---[ \t]*\n(?P<block>.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE
)


def split_card(text: str) -> tuple[Mapping[str, Any], str]:
    r"""A card's metadata and its text.

    Raises:
        FormatError: If there is metadata that is no YAML mapping.

    >>> split_card("---\nlicense: mit\n---\n# Law\n")
    ({'license': 'mit'}, '# Law\n')
    """
    found = _METADATA.match(text)
    if not found:
        return {}, text
    return _parse(found["block"]), text[found.end() :]


def with_fields(text: str, fields: Mapping[str, Any]) -> str:
    r"""The card with some metadata fields set; all other lines stay as they are, with their comments and order.

    Tags are added to those that are there; other values are replaced.

    Raises:
        FormatError: If the metadata is no YAML mapping, or written so that single fields cannot be changed in it.

    >>> with_fields("---\ntags: [law]  # mine\nlicense: mit # ours\n---\nText", {"tags": ["merge"]})
    '---\ntags:\n- law\n- merge\nlicense: mit # ours\n---\nText'
    """
    found = _METADATA.match(text)
    before, block = (found["before"], found["block"]) if found else ("", "")
    rest = text[found.end() :] if found else text
    known = _parse(block)
    lines = _lines(block)
    wanted: dict[str, Any] = {}
    for key, value in fields.items():
        wanted[key] = _extended(known.get(key), value) if key == _ADDED_TO else value
        if key in known and wanted[key] == known[key]:
            continue
        start, stop = _place(lines, key)
        lines[start:stop] = _written(key, wanted[key])
    made = "".join(lines)
    if _parse(made) != {**known, **wanted}:
        raise FormatError(
            f"the metadata of {CARD_NAME} is written so that single fields cannot be changed. Write one field a line."
        )
    return f"{before}---\n{made}---\n{rest}"


def with_section(text: str, section: str) -> str:
    r"""The card with our section in its place, or at its end where there was none.

    Raises:
        FormatError: If only one of its two marks is there.

    >>> once = with_section("# Law\n", "Good.")
    >>> with_section(once, "Better.") == once.replace("Good.", "Better.")
    True
    """
    begin, end = text.find(BEGIN), text.find(END)
    if (begin < 0) != (end < 0) or end < begin:
        raise FormatError(
            f"{CARD_NAME} has lost one of the marks {BEGIN} and {END}. Put it back or delete both."
        )
    ours = f"{BEGIN}\n{section.strip()}\n{END}"
    if begin < 0:
        gap = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}{ours}\n"
    return text[:begin] + ours + text[end + len(END) :]


def read_card(folder: Path) -> str:
    """The text of a folder's card; empty where there is none.

    Raises:
        FormatError: If it is no text in UTF-8.
    """
    path = folder / CARD_NAME
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except ValueError as error:
        raise FormatError(f"{path} is not text in UTF-8 ({error}).") from error


def update_card(folder: Path, fields: Mapping[str, Any], section: str) -> Path:
    """Write or update ``README.md`` of a folder; running it again changes nothing.

    Raises:
        FormatError: If the card cannot be changed without touching what is not ours. It is as it was then.
    """
    path, text = folder / CARD_NAME, read_card(folder)
    made = with_section(with_fields(text, fields), section)
    if made != text:
        with new_file(path) as temporary:
            temporary.write_text(made, encoding="utf-8", newline=_line_end(path))
    return path


def _line_end(path: Path) -> str:
    """What lines of a text end with: those of Windows, where all do, or a line feed."""
    text = path.read_bytes() if path.is_file() else b""
    return "\r\n" if 0 < text.count(b"\r\n") == text.count(b"\n") else "\n"


def _parse(block: str) -> dict[str, Any]:
    content = parse_yaml(block, f"the metadata of {CARD_NAME}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise FormatError(f"the metadata of {CARD_NAME} is a {type(content).__name__}, not fields by name.")
    return content


def _extended(known: Any, more: list[Any]) -> list[Any]:
    held = known if isinstance(known, list) else [] if known is None else [known]
    return [*held, *(item for item in more if item not in held)]


def _place(lines: list[str], key: str) -> tuple[int, int]:
    """The lines of a top-level field; the end of all lines where there is none."""
    start = next(
        (i for i, line in enumerate(lines) if re.match(rf"[\"']?{re.escape(key)}[\"']?\s*:", line)),
        len(lines),
    )
    stop = start + 1
    while stop < len(lines) and re.match(r"\s|-(?!--)|$", lines[stop]):
        stop += 1
    return start, min(stop, len(lines))


def _written(key: str, value: Any) -> list[str]:
    readable, escaped = (
        yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=unicode) for unicode in (True, False)
    )
    # Characters such as U+0085 do not survive as they are.
    return _lines(readable if yaml.safe_load(readable) == {key: value} else escaped)


def _lines(text: str) -> list[str]:
    """Lines with their ends. Only line feeds count: ``splitlines`` also cuts at characters that stand inside values."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
