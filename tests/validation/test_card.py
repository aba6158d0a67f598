from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mergeready.errors import FormatError, OptionError
from mergeready.validation import Report, validate
from mergeready.validation.card import section, write_card
from mergeready.validation.check import Verdict
from mergeready.weights.model_card import split_card
from tests.validation.experts import edit_json, write_adapter, write_base, write_full


@pytest.fixture
def law(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return write_adapter(tmp_path / "law")


def card(folder: Path) -> tuple[dict[str, object], str]:
    fields, text = split_card((folder / "README.md").read_text(encoding="utf-8"))
    return dict(fields), text


def report_with(*verdicts: Verdict) -> Report:
    return Report(
        expert="law", level="composition", verdicts=verdicts, facts={"versions": {"mergeready": "1"}}
    )


def verdict(id_: str, value: float, message: str = "found") -> Verdict:
    return Verdict(
        id=id_,
        level="composition",
        severity="error",
        title="t",
        status="passed",
        message=message,
        value=value,
    )


def test_the_card_of_an_adapter(law: Path, tmp_path: Path) -> None:
    report = validate(law, tmp_path / "base", level="base")
    write_card(law, report, base=tmp_path / "base")
    fields, text = card(law)
    assert fields["base_model"] == "org/base"
    assert fields["base_model_relation"] == "adapter"
    assert fields["license"] == "apache-2.0"
    assert fields["tags"] == ["mergeready"]
    ours = fields["mergeready"]
    assert ours["verdicts"] == {v.id: v.status for v in report.verdicts}
    assert len(ours["base_fingerprint"]) == 64
    assert ours["merge_ready"] is False
    assert "Answers questions about law." in text
    assert "Not a verdict on merging" in text
    assert str(tmp_path) not in (law / "README.md").read_text()


def test_it_is_the_same_the_second_time(law: Path, tmp_path: Path) -> None:
    report = validate(law, tmp_path / "base", level="base")
    write_card(law, report, base=tmp_path / "base", dataset="org/cases")
    once = (law / "README.md").read_bytes()
    write_card(law, report, base=tmp_path / "base", dataset="org/cases")
    assert (law / "README.md").read_bytes() == once


def test_a_full_model_is_a_finetune_and_names_its_base_when_told(tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    (law / "README.md").unlink()
    write_card(law, validate(law), base_model="org/other")
    fields, _ = card(law)
    assert (fields["base_model"], fields["base_model_relation"]) == ("org/other", "finetune")


def test_a_merge_stays_a_merge(tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    (law / "README.md").write_text("---\nbase_model: [org/a, org/b]\ntags: [mergekit, merge]\n---\n# Both\n")
    write_card(law, validate(law, level="file"))
    assert card(law)[0]["base_model_relation"] == "merge"


def test_a_local_base_is_never_written(law: Path, tmp_path: Path) -> None:
    (law / "README.md").unlink()
    edit_json(law / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    write_card(law, validate(law, tmp_path / "base"))
    assert "base_model" not in card(law)[0]
    assert str(tmp_path) not in (law / "README.md").read_text()
    with pytest.raises(OptionError, match="hub id"):
        write_card(law, validate(law), base_model=str(tmp_path / "base"))


@pytest.mark.parametrize("place", ["/home/me/secret", "../secret", "./secret", "~/secret"])
def test_paths_in_messages_are_left_out(place: str) -> None:
    text = section(report_with(verdict("F001", 1.0, f"read {place}/model.safetensors, 3 tensors | fine")))
    assert "secret" not in text
    assert "3 tensors \\| fine" in text


def test_names_in_messages_stay_names() -> None:
    """Pages of the hub would take tokens for tags, and names from a stranger's file for pictures to be fetched."""
    text = section(report_with(verdict("B104", 1.0, "lacks '<s>', '<!-- mergeready:end -->', '![](pixel)'")))
    assert "lacks '&lt;s>', '&lt;!-- mergeready:end -->', '!\\[](pixel)'" in text


def test_scores_are_in_the_index_that_the_hub_reads(law: Path) -> None:
    report = report_with(verdict("C402", 0.75), verdict("E302", 0.1))
    write_card(law, report, dataset="org/cases")
    write_card(law, report_with(verdict("C402", 0.5)), dataset="org/cases")
    data = ModelCard.load(law / "README.md").data
    assert data.eval_results is not None
    [result] = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("org/cases", "retention", 0.5)


def test_a_card_that_is_no_text_stays_as_it_is(law: Path) -> None:
    content = "---\nlicense: mit\n---\nRechtsprüfung\n".encode("latin-1")
    (law / "README.md").write_bytes(content)
    with pytest.raises(FormatError, match=r"README\.md is not text in UTF-8"):
        write_card(law, validate(law, level="file"))
    assert (law / "README.md").read_bytes() == content
