from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from mergeready.errors import FormatError
from mergeready.weights.yaml_text import MAX_ALIASES, MAX_CHARACTERS, MAX_DEPTH, parse_yaml, read_yaml


def test_plain_yaml_reads_as_the_library_reads_it() -> None:
    text = "a: [1, 2.5, null, true]\nb: &x {c: d}\ne: *x\n"
    assert parse_yaml(text, "text") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a" * (MAX_CHARACTERS + 1), "longer than 1,000,000"),
        ("[" * 100_000, f"more than {MAX_DEPTH} levels"),
        ("{a: " * 100_000, f"more than {MAX_DEPTH} levels"),
        ("a: &a x\nb: [" + "*a, " * (MAX_ALIASES + 1) + "]", f"more than {MAX_ALIASES} times"),
        ("a: [1", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: 2024-99-99", "is not YAML"),
        ("a\x00b", "is not YAML"),
    ],
)
def test_hostile_texts_are_refused_at_once(text: str, reason: str) -> None:
    began = time.process_time()
    with pytest.raises(FormatError, match=reason):
        parse_yaml(text, "card")
    assert time.process_time() - began < 2


def test_exponential_aliases_are_not_followed() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 13)]
    with pytest.raises(FormatError, match="refers back"):
        parse_yaml("\n".join(lines), "card")


@pytest.mark.parametrize(
    "text",
    [
        '"' + "a" * (MAX_CHARACTERS - 2) + '"',
        "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "[" + "[], " * (2 * MAX_DEPTH) + "]",
        "a: &a x\nb: [" + "*a, " * MAX_ALIASES + "]",
    ],
    ids=["long", "deep", "wide", "aliases"],
)
def test_what_is_within_the_limits_is_read(text: str) -> None:
    assert parse_yaml(text, "card") == yaml.safe_load(text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for content in (None, b"a: \xff\xfe"):
        path = tmp_path / "card.yaml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FormatError, match=r"card\.yaml cannot be read"):
            read_yaml(path)
    path.write_text("a: é\n", encoding="utf-8")
    assert read_yaml(path) == {"a": "é"}
