"""How texts and pairs of texts are encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from mergeready.errors import OptionError
from mergeready.recipes import parse_recipe, tiny
from mergeready.recipes.run import prepare

PAIRS = [("a cat", "an animal", "yes"), ("it rains all day", "dry", "no"), ("one", "two three", "no")]


def content(folder: Path, **task: Any) -> dict[str, Any]:
    columns = zip(("premise", "claim", "label"), zip(*PAIRS, strict=True), strict=True)
    data = Dataset.from_dict({name: list(values) for name, values in columns})
    if not (folder / "data").exists():  # a first recipe may be reading it
        DatasetDict(train=data, validation=data).save_to_disk(folder / "data")
        names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own tokenizer has them
        AutoTokenizer.from_pretrained(tiny.text(), model_input_names=names).save_pretrained(
            folder / "tokenizer"
        )
    return {
        "model": {"name": "mergeready.recipes.tiny:text", "processor": str(folder / "tokenizer")},
        "data": str(folder / "data"),
        "task": {"kind": "text-classification", "text": ["premise", "claim"], "max_tokens": 64, **task},
        "optimisation": {"learning_rate": 1e-3, "steps": 1, "batch_size": 2, "device": "cpu"},
        "output": str(folder / "run"),
    }


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_model_is_told_which_text_of_a_pair_a_token_is_of(tmp_path: Path, lora: Any) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    prepared = prepare(parse_recipe(content(tmp_path, lora=lora)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model: Any = prepared.trainer.model.eval()
    right = []
    for premise, claim, label in PAIRS:
        encoded = tokenizer(premise, claim, return_tensors="pt")
        assert encoded["token_type_ids"].unique().tolist() == [0, 1]
        with torch.no_grad():
            logits = model(**encoded).logits
        right.append(torch.nn.functional.cross_entropy(logits, torch.tensor([["no", "yes"].index(label)])))
    given = content(tmp_path, lora=lora) | {"evaluation": "loss", "output": str(tmp_path / "other")}
    judged = prepare(parse_recipe(given))
    judged.trainer.model.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = judged.evaluations["validation"](judged.trainer.model.eval())
    torch.testing.assert_close(found["loss"], torch.stack(right))


def test_three_texts_are_no_pair(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"`task\.text`"):
        parse_recipe(content(tmp_path, text=["premise", "claim", "label"]))


def test_models_that_know_no_pairs_are_not_told(tmp_path: Path) -> None:
    """The tokenizer gives a Llama, too, which text a token is of."""
    given = content(tmp_path)
    given["model"] |= {"name": "mergeready.recipes.tiny:llama"}
    prepared = prepare(parse_recipe(given))
    assert set(prepared.trainer.train_dataset.column_names) == {"input_ids", "attention_mask", "labels"}
    with torch.no_grad():
        assert prepared.evaluations["validation"](prepared.trainer.model.eval())["accuracy"].shape == (3,)
