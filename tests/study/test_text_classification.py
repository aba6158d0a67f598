from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertModel, BertTokenizerFast

from mergeready.errors import FormatError
from mergeready.study.run import Runner
from mergeready.study.settings import parse_study
from mergeready.study.text_classification import suite

COLORS, SIZES = ("red", "green", "blue"), ("small", "large")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLORS, *SIZES, "thing"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "encoder")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder / "encoder")
    rows = [(f"{size} {color} thing", size, color) for size in SIZES for color in COLORS] * 10
    for name, column in (("sizes", 1), ("colors", 2)):
        data = Dataset.from_dict({"text": [r[0] for r in rows], "label": [r[column] for r in rows]})
        DatasetDict({"train": data}).save_to_disk(folder / name)
    return folder


def test_your_own_data_are_studied_from_a_file_alone(world: Path, tmp_path: Path) -> None:
    settings = parse_study(
        {
            "name": "own",
            "suite": {
                "target": "mergeready.study.text_classification:suite",
                "arguments": {
                    "model": str(world / "encoder"),
                    "datasets": {"sizes": str(world / "sizes"), "colors": str(world / "colors")},
                },
            },
            "steps": [4],
            "train": {"learning_rate": 1e-3, "batch_size": 8},
            "methods": ["task_arithmetic"],
        }
    )
    runner = Runner(settings, tmp_path / "own")
    assert runner.run() == 2
    results = {cell.method: content for cell, content in runner.results().items()}
    for task in ("sizes", "colors"):
        test = results["expert"]["tasks"][task]["test"]
        assert len(test) == 12
        assert sum(test) / len(test) > 0.8  # six different texts, of which all are trained on


def test_a_missing_column_is_named(world: Path) -> None:
    with pytest.raises(FormatError, match="sizes has no column body, only text, label"):
        suite(0, str(world / "encoder"), {"sizes": str(world / "sizes")}, text="body")
