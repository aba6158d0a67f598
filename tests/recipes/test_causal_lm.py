"""Recipes of language models: from which columns they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from mergeready.errors import OptionError
from mergeready.recipes import parse_recipe
from mergeready.recipes.run import prepare
from mergeready.recipes.tiny import llama

pytest.importorskip("trl", reason="the trl extra brings it")

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"


def rows(count: int) -> Dataset:
    """Chats as the large public collections have them: with the first question once more in a column of its own."""
    chats = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"answer {i}"}]
        for i in range(count)
    ]
    return Dataset.from_dict({"prompt": [f"q{i}" for i in range(count)], "messages": chats})


def recipe(folder: Path, data: DatasetDict, **task: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(llama())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    data.save_to_disk(folder / "data")
    return parse_recipe(
        {
            "model": {"name": "mergeready.recipes.tiny:llama", "processor": str(folder / "tokenizer")},
            "data": str(folder / "data"),
            "task": {"kind": "causal-lm", "max_tokens": 64, **task},
            "optimisation": {"learning_rate": 1e-3, "steps": 1, "batch_size": 2, "device": "cpu"},
            "output": str(folder / "run"),
        }
    )


def test_a_column_beside_messages_does_not_mislead(tmp_path: Path) -> None:
    data = DatasetDict(train=rows(4), validation=rows(2))
    prepared = prepare(recipe(tmp_path, data))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = tokenizer.decode(prepared.trainer.train_dataset[1]["input_ids"]).replace(" ", "")
    assert "uq1aanswer1" in text
    assert prepared.trainer.eval_dataset["validation"].num_rows == 2


def test_columns_that_hold_nothing_to_learn_are_named(tmp_path: Path) -> None:
    data = DatasetDict(train=rows(4), validation=rows(2).remove_columns("messages"))
    with pytest.raises(OptionError, match=r"columns prompt in all splits; .* else from `messages`"):
        prepare(recipe(tmp_path, data))
