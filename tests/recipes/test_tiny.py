from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from mergeready.recipes import tiny
from tests.models import tiny_encoder


def test_a_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "gettempdir", lambda: str(tmp_path))
    made = tiny.text()
    before = made.stat().st_ino
    assert tiny.text() == made
    assert made.stat().st_ino == before
    assert BertModel.from_pretrained(made).config.hidden_size == 32


def test_the_model_of_a_faster_rank_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be reading its files already."""
    monkeypatch.setattr(tiny, "gettempdir", lambda: str(tmp_path))
    theirs: list[tuple[Path, int]] = []

    def slow() -> Any:
        folder = tiny.text()
        theirs.append((folder, folder.stat().st_ino))
        return tiny_encoder()

    folder = tiny._made("bert", slow)
    assert [(folder, folder.stat().st_ino)] == theirs
    assert [path.name for path in folder.parent.iterdir()] == ["bert"]
