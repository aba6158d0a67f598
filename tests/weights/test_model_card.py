from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import FormatError
from mergeready.weights.model_card import BEGIN, END, split_card, update_card, with_fields, with_section

CARD = """---
# what it was made from
base_model: org/base   # a comment
datasets:
- a
- b

license: apache-2.0
model-index:
- name: law
  results:
  - task: {type: text-classification}
---
# Law

Text with --- dashes.
"""


def test_only_the_named_fields_change(tmp_path: Path) -> None:
    made = with_fields(CARD, {"tags": ["merge"], "license": "mit", "datasets": ["a", "b", "c"]})
    before, after = CARD.splitlines(), made.splitlines()
    assert [line for line in before if line not in after] == ["", "license: apache-2.0"][1:]
    fields, text = split_card(made)
    assert fields == {
        **split_card(CARD)[0],
        "license": "mit",
        "tags": ["merge"],
        "datasets": ["a", "b", "c"],
    }
    assert text == split_card(CARD)[1]


def test_the_hubs_library_reads_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    update_card(tmp_path, {"mergeready": {"schema": 1, "verdicts": {"F001": "passed"}}}, "## Merging")
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=True)
    data = card.data.to_dict()
    assert data["mergeready"] == {"schema": 1, "verdicts": {"F001": "passed"}}
    assert data["base_model"] == "org/base"
    assert "## Merging" in card.text
    assert "Text with --- dashes." in card.text


def test_twice_is_once(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    fields = {"tags": ["merge", "x"], "mergeready": {"a": [1, 2], "b": {"c": None}}}
    update_card(tmp_path, fields, "One.")
    once = (tmp_path / "README.md").read_bytes()
    update_card(tmp_path, fields, "One.")
    assert (tmp_path / "README.md").read_bytes() == once


def test_a_new_card(tmp_path: Path) -> None:
    path = update_card(tmp_path, {"license": "mit"}, "Ours.")
    assert path.read_text(encoding="utf-8") == f"---\nlicense: mit\n---\n\n{BEGIN}\nOurs.\n{END}\n"


@pytest.mark.parametrize("before", ["\n", "\ufeff", " \n\n"])
def test_metadata_is_where_the_hub_sees_it(tmp_path: Path, before: str) -> None:
    """A second block above it would hide the first from the hub: its licence and base would be gone."""
    (tmp_path / "README.md").write_text(before + CARD, encoding="utf-8")
    assert split_card(before + CARD) == split_card(CARD)
    path = update_card(tmp_path, {"tags": ["merge"]}, "Ours.")
    assert path.read_text(encoding="utf-8").startswith(f"{before}---\n# what it was made from\n")
    data = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data
    assert (data.license, data.base_model, data.tags) == ("apache-2.0", "org/base", ["merge"])


def test_lines_of_windows_stay_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    made = update_card(tmp_path, {"tags": ["merge"]}, "Ours.").read_bytes()
    assert made.count(b"\n") == made.count(b"\r\n")
    assert b"license: apache-2.0\r\n" in made
    assert update_card(tmp_path, {"tags": ["merge"]}, "Ours.").read_bytes() == made


def test_a_card_without_metadata(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Law", encoding="utf-8")
    update_card(tmp_path, {"license": "mit"}, "Ours.")
    assert (tmp_path / "README.md").read_text().endswith(f"---\n# Law\n\n{BEGIN}\nOurs.\n{END}\n")


def test_a_single_value_becomes_a_list() -> None:
    assert split_card(with_fields("---\ntags: law\n---\n", {"tags": ["merge"]}))[0] == {
        "tags": ["law", "merge"]
    }


@pytest.mark.parametrize(
    "text", ["---\n- a\n---\n", "---\na: [\n---\n", "---\n{license: mit, tags: [a]}\n---\n"]
)
def test_what_cannot_be_changed_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match="metadata"):
        update_card(tmp_path, {"license": "apache-2.0"}, "Ours.")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", [f"a {BEGIN} b", f"a {END} b", f"{END} {BEGIN}"])
def test_lost_marks(text: str) -> None:
    with pytest.raises(FormatError, match="marks"):
        with_section(text, "Ours.")


keys = st.sampled_from(["license", "tags", "base_model", "mergeready", "datasets", "x-y"])
plain = st.one_of(st.integers(), st.booleans(), st.none(), st.text(max_size=20), st.floats(allow_nan=False))
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


fields_of_a_card = st.dictionaries(keys, values, max_size=5)
ours = st.fixed_dictionaries(
    {}, optional={"tags": st.lists(st.text(max_size=9), max_size=3), "x-y": values, "license": plain}
)


@given(fields_of_a_card, ours, st.text(max_size=30))
def test_any_fields_come_back(old: dict[str, object], new: dict[str, object], body: str) -> None:
    body = body.replace("\r", "")
    text = f"---\n{yaml.safe_dump(old, sort_keys=False)}---\n{body}" if old else body
    if not old and body.startswith("---"):
        return
    fields, rest = split_card(with_fields(text, new))
    assert rest == body
    for key, value in new.items():
        if key == "tags":
            assert all(item in fields[key] for item in value)
        else:
            assert fields[key] == value
    assert {k: v for k, v in fields.items() if k not in new} == {k: v for k, v in old.items() if k not in new}
