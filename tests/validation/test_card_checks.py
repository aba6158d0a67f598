"""What cards and other texts of strangers say, and what they should not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.validation import Verdict, validate
from tests.validation.experts import CARD, write_adapter


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "law")


def verdict(folder: Path, name: str) -> Verdict:
    return next(v for v in validate(folder, level="file").verdicts if v.id == name)


@pytest.mark.parametrize("before", ["\n", "\ufeff", "   \n"])
def test_metadata_that_the_hub_sees_is_seen(law: Path, before: str) -> None:
    (law / "README.md").write_text(before + CARD, encoding="utf-8")
    assert verdict(law, "P501").message == "base_model org/base, license apache-2.0"


def test_scores_of_many_tasks_do_not_hide_what_follows(law: Path) -> None:
    scores = "".join(f"- {{name: task-{i}, type: sts, value: {i}.5}}\n" for i in range(5000))
    (law / "README.md").write_text(CARD.replace("base_model:", f"scores:\n{scores}base_model:"))
    assert verdict(law, "P501").status == "passed"


def test_metadata_that_cannot_be_read_is_said_to_be_there(law: Path) -> None:
    (law / "README.md").write_text("---\nlicense: [mit\n---\n")
    found = verdict(law, "P501")
    assert found.status == "failed"
    assert "is not YAML" in found.message
