from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import FormatError
from mergeready.recipes.document import Document, parse_document, parse_value, read_document

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abcxyz -", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text("abcdef", min_size=1), plain))
def test_values_are_those_of_yaml(content: dict[str, object]) -> None:
    text = yaml.safe_dump(content)
    assert parse_document(text).content == yaml.safe_load(text)


def test_lines_point_at_keys_and_entries() -> None:
    document = parse_document("a: 1\nb:\n  c: 2\n  d:\n  - x\n  - y\n", "run.yaml")
    assert document.lines[("b", "c")] == 3
    assert document.lines[("b", "d", 1)] == 6
    assert document.place(("b", "d", 1, "deeper")) == "run.yaml, line 6"
    assert document.place(("unknown",)) == "run.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", "settings by name"),
        ("", "settings by name"),
        ("a: 1\nb: 2\na: 3\n", "line 3: `a` is given twice; the first is in line 1"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
        ("? [1, 2]\n: 3\n", "is not YAML"),
    ],
)
def test_what_is_no_document_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_document(text)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="cannot be read"):
        read_document(tmp_path / "a.yaml")
    with pytest.raises(FormatError, match="cannot be read"):
        read_document(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-3e2", -300.0),
        ("7", 7),
        ("0.5", 0.5),
        ("yes", True),
        ("", None),
        ("1e", "1e"),
    ],
)
def test_numbers_without_a_point_are_numbers(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_keys_are_names_even_where_yaml_means_yes_and_no() -> None:
    document = parse_document("a: {on: yes, no: {off: 1}}\n")
    assert document.content == {"a": {"on": True, "no": {"off": 1}}}
    assert document.lines[("a", "no", "off")] == 1
    assert parse_value("{on: merged}") == {"on": "merged"}


def test_anchors_keep_their_lines() -> None:
    document = parse_document("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n")
    assert document.content["c"] == {"b": 1, "d": 2}
    assert isinstance(document, Document)
