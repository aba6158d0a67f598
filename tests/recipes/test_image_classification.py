"""What the text encoder of CLIP reads for a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeready.errors import OptionError
from mergeready.recipes import image_classification, parse_recipe
from mergeready.recipes.run import prepare

LETTERS = "mergeready.demo.samples:letters"
JOINED = {
    "join": {task: {"name": LETTERS, "with": {"task": task, "count": 8}} for task in ("letter", "face")}
}


def content(folder: Path, data: Any, **task: Any) -> dict[str, Any]:
    return {
        "model": "mergeready.recipes.tiny:clip",
        "data": data,
        "task": {"kind": "image-classification", "head": "zero-shot", "prompt": "a {} here", **task},
        "optimisation": {"learning_rate": 1e-3, "steps": 1, "batch_size": 4, "device": "cpu"},
        "output": str(folder / "run"),
    }


@pytest.mark.parametrize("joined", [False, True])
def test_prompts_name_classes_and_not_the_task_that_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    read: list[str] = []
    real = image_classification.zero_shot_classifier

    def noted(folder: str, recipe: Any, prompts: list[str]) -> Any:
        read.extend(prompts)
        return real(folder, recipe, prompts)

    monkeypatch.setattr(image_classification, "zero_shot_classifier", noted)
    data = JOINED if joined else JOINED["join"]["letter"]
    model = prepare(parse_recipe(content(tmp_path, data))).trainer.model
    assert read[:2] == ["a A here", "a B here"]
    assert read[16:18] == (["a sans here", "a sans bold here"] if joined else [])
    assert len(read) == len(model.head) == (24 if joined else 16)


def test_names_for_other_classes_are_refused(tmp_path: Path) -> None:
    given = content(tmp_path, JOINED["join"]["face"], class_names=["one", "two"])
    with pytest.raises(OptionError, match=r"`task\.class_names` has 2 names for 8 classes"):
        prepare(parse_recipe(given))
