"""Classes as numbers: where they come from, and which number is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from mergeready.errors import OptionError
from mergeready.recipes import parse_recipe
from mergeready.recipes.classes import Classes, load_classes


def loaded(data: dict[str, Any]) -> tuple[dict[Any, Dataset], Classes]:
    recipe = parse_recipe(
        {
            "model": "org/base",
            "data": data,
            "task": {"kind": "text-classification"},
            "optimisation": {"learning_rate": 1e-3, "steps": 1},
            "output": "run",
        }
    )
    return load_classes(recipe, ["text"], "label")


def written(folder: Path, labels: list[Any], **others: list[Any]) -> str:
    parts = {"train": labels, **others}
    made = {
        split: Dataset.from_dict({"text": [f"{split} {i}" for i in range(len(part))], "label": part})
        for split, part in parts.items()
    }
    DatasetDict(made).save_to_disk(folder)
    return str(folder)


def test_a_limit_leaves_out_examples_and_no_classes(tmp_path: Path) -> None:
    """A smoke run of 32 examples of a set of many classes has to work."""
    labels = [f"class {index:02}" for index in range(60)]
    folder = written(tmp_path / "data", labels, validation=labels)
    splits, classes = loaded({"name": folder, "limit": {"train": 4, "validation": 50}})
    assert classes.names == tuple(labels)
    for split, rows in (("train", 4), ("validation", 50)):
        data = splits[split]
        assert len(data) == rows
        assert [int(text.split()[1]) for text in data["text"]] == list(data["labels"])


def test_a_class_whose_only_example_is_held_out_is_a_class(tmp_path: Path) -> None:
    labels = ["often"] * 9 + [f"once {index}" for index in range(9)]
    splits, classes = loaded({"name": written(tmp_path / "data", labels), "holdout": 0.5})
    assert len(classes.names) == 10
    assert len(splits["train"]) == len(splits["validation"]) == 9


def test_classes_outside_the_training_data_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", ["a", "b"], test=["a", "c", "d"])
    with pytest.raises(OptionError, match="the test data has classes that the training data lacks: c, d"):
        loaded({"name": folder})


def test_examples_without_a_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="examples without a class: `label` is empty"):
        loaded({"name": written(tmp_path / "data", ["a", None, "b"])})


def test_names_of_a_dataset_keep_their_order(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ape", "never seen"])})
    part = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "data")
    splits, classes = loaded({"name": str(tmp_path / "data")})
    assert classes.names == ("zebra", "ape", "never seen")
    assert list(splits["train"]["labels"]) == [1, 0]


def test_joined_tasks_have_classes_beside_each_other(tmp_path: Path) -> None:
    parts = {
        "x": {"name": written(tmp_path / "x", ["b", "a"], validation=["a"])},
        "y": {"name": written(tmp_path / "y", ["b", "c"], validation=["c"])},
    }
    splits, classes = loaded({"join": parts})
    assert classes.names == ("x: a", "x: b", "y: b", "y: c")
    assert classes.groups == (0, 0, 1, 1)
    assert list(splits["train"]["labels"]) == [1, 0, 2, 3]
    assert list(splits["validation"]["labels"]) == [0, 3]
