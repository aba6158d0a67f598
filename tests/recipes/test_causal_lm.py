"""Recipes of language models: from which columns they learn, and which tokens they are judged by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from mergeready.errors import OptionError
from mergeready.recipes import parse_recipe, read_recipe
from mergeready.recipes.causal_lm import padded
from mergeready.recipes.run import prepare, run_recipe
from mergeready.recipes.sources import EvaluationSettings
from mergeready.recipes.tiny import llama

pytest.importorskip("trl", reason="the trl extra brings it")

RECIPES = Path(__file__).parents[2] / "recipes"
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


def test_chats_need_a_template(tmp_path: Path) -> None:
    data = DatasetDict(train=rows(4), validation=rows(2))
    given = recipe(tmp_path, data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    model = given.model.model_copy(update={"processor": str(tmp_path / "plain")})
    with pytest.raises(OptionError, match="chats, and the tokenizer of `model` has no template"):
        prepare(given.model_copy(update={"model": model}))


def test_a_smoke_run_takes_chats_of_ones_own_and_learns_what_assistants_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(4).to_json("my_chats.jsonl")
    changes = ["data=my_chats.jsonl", "task.assistant_only=true", "output=run"]
    given = read_recipe(RECIPES / "hub/llama_8b_lora_fsdp2.yaml", changes, quick=True)
    prepared = prepare(given)
    row = prepared.trainer.train_dataset[0]
    spoken = [token for token in row["labels"] if token != -100]
    assert re.fullmatch(r"answer\d</s>", prepared.processor.decode(spoken).replace(" ", ""))


def test_columns_that_hold_nothing_to_learn_are_named(tmp_path: Path) -> None:
    data = DatasetDict(train=rows(4), validation=rows(2).remove_columns("messages"))
    with pytest.raises(OptionError, match=r"columns prompt in all splits; .* else from `messages`"):
        prepare(recipe(tmp_path, data))


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_metric_is_of_what_is_learned_and_of_nothing_else(tmp_path: Path, metric: str) -> None:
    """By hand, one example at a time and unpadded: the completion and the end of it, given the prompt."""
    texts = [("ab", "cde"), ("abcdefgh", "i"), ("x", "yz")]
    data = Dataset.from_dict({"prompt": [a for a, _ in texts], "completion": [b for _, b in texts]})
    given = recipe(tmp_path, DatasetDict(train=data, validation=data))
    prepared = prepare(given.model_copy(update={"evaluation": EvaluationSettings(name=metric)}))
    model = prepared.trainer.model.eval()
    tokenizer = prepared.processor
    expected = []
    for prompt, completion in texts:
        ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        learned = slice(len(tokenizer(prompt)["input_ids"]), None)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        values = losses if metric == "loss" else (logits.argmax(1) == ids[0, 1:]).float()
        expected.append(values[learned.start - 1 :].mean())
    with torch.no_grad():
        found = prepared.evaluations["validation"](model)[metric]
    torch.testing.assert_close(found, torch.stack(expected))


def test_masks_of_older_trl_say_the_same_as_labels() -> None:
    rows = [
        {"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        {"input_ids": [6, 7], "completion_mask": [0, 1], "assistant_masks": [1, 1]},
    ]
    batch = padded(rows, pad=9)
    assert batch["labels"].tolist() == [[-100, 4, -100], [-100, 7, -100]]
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded([{"input_ids": [3, 4]}], pad=9)["labels"].tolist() == [[3, 4]]


@pytest.mark.slow
def test_a_packed_run_is_probed(tmp_path: Path) -> None:
    data = DatasetDict(train=rows(24), validation=rows(4))
    result = run_recipe(recipe(tmp_path, data, packing=True))
    assert result.metric == "loss"
    assert result.steps == 1
    assert set(result.scores) == {"validation"}
