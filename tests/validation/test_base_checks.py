from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.validation import Verdict, validate
from tests.validation.corpus import WORDS, write_tokenizer
from tests.validation.experts import edit_json, write_adapter, write_base, write_full


def verdict(folder: Path, base: Path, name: str) -> Verdict:
    return next(v for v in validate(folder, base, level="base").verdicts if v.id == name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base")
    write_tokenizer(folder)
    return folder


def test_rows_in_another_order_are_no_sign_of_quantised_weights(base: Path, tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    write_tokenizer(law, WORDS | {"the": 2, "law": 1})
    report = validate(law, base, level="base")
    assert any("paired by token" in note for note in report.facts["notes"])
    assert verdict(law, base, "B106").status == "passed"


@pytest.mark.parametrize(
    ("revision", "status"), [("0a1b2c3d" * 5, "passed"), ("0a1b2c3", "passed"), ("main", "failed")]
)
def test_only_a_commit_pins_a_base(base: Path, tmp_path: Path, revision: str, status: str) -> None:
    law = write_adapter(tmp_path / "law")
    edit_json(law / "adapter_config.json", revision=revision)
    assert verdict(law, base, "B107").status == status


def test_embeddings_that_a_full_model_stores_are_not_called_changed(base: Path, tmp_path: Path) -> None:
    """Its verdict stands in the model card of every full expert."""
    message = verdict(write_full(tmp_path / "law"), base, "B105").message
    assert message.startswith("embeddings are in the base's places: bert.embeddings")
    adapted = write_adapter(tmp_path / "code", target_modules=["word_embeddings", "query"])
    assert verdict(adapted, base, "B105").message.startswith("embeddings are changed: bert.embeddings.word")
