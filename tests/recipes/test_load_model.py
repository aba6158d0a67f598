"""What of a model trains, and what of it has to be saved beside adapters."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.recipes import parse_recipe, read_recipe, tiny
from mergeready.recipes.load_model import base_of
from mergeready.recipes.run import prepare
from mergeready.training.save import save_expert

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES: dict[str, Any] = {
    "vocab_size": 110,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": "mergeready.recipes.tiny:text",
        "data": {
            "name": "mergeready.demo.samples:texts",
            "with": {"task": "udhr"},
            "limit": {"train": 16, "validation": 8, "test": 8},
        },
        "task": {"kind": "text-classification", "max_tokens": 16, "lora": {"rank": 2}},
        "optimisation": {"learning_rate": 1e-3, "steps": 1, "batch_size": 4, "device": "cpu"},
        "output": str(folder / "run"),
    } | changes


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """Where an adapter was saved after what trains of it was moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    save_expert(model, folder)
    return folder


@pytest.mark.parametrize("kind", ["image", "score", "a base without its pooler"])
def test_an_adapter_that_is_loaded_again_on_its_base_is_the_expert(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    given, auto = content(tmp_path), AutoModelForSequenceClassification
    ids = torch.randint(4, 90, (3, 8))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "image":
        letters = {"name": "mergeready.demo.samples:letters", "with": {"task": "face", "count": 8}}
        given["model"], given["data"] = "mergeready.recipes.tiny:vit", letters
        given["task"] = {"kind": "image-classification", "lora": {"rank": 2}}
        auto, inputs = AutoModelForImageClassification, {"pixel_values": torch.randn(3, 3, 32, 32)}
    elif kind == "score":
        given["model"] = "mergeready.recipes.tiny:llama"
    else:
        BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny.text()).save_pretrained(tmp_path / "base")
        given["model"] = str(tmp_path / "base")
    prepared = prepare(parse_recipe(given))
    expert: Any = prepared.trainer.model.eval()
    folder = saved(expert, tmp_path / "expert")
    torch.manual_seed(99)  # whoever loads it draws another head
    fresh = auto.from_pretrained(prepared.base, num_labels=expert.config.num_labels)
    if kind != "image":
        fresh.config.pad_token_id = expert.config.pad_token_id
    again = peft.PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expert(**inputs).logits)
    others = [name for name in trained(expert) if "lora_" not in name and "modules_to_save" not in name]
    assert not others, "everything of the base stays as it is"


def test_a_head_that_is_trained_whole_gets_no_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    letters = {"name": "mergeready.demo.samples:letters", "with": {"count": 8}}
    task = {"kind": "image-classification", "lora": {"rank": 2}}
    given = content(tmp_path, model="mergeready.recipes.tiny:vit", data=letters, task=task)
    head = {name for name in trained(prepare(parse_recipe(given)).trainer.model) if "classifier" in name}
    assert {name.partition("modules_to_save")[2] for name in head} == {".default.weight", ".default.bias"}


@pytest.mark.parametrize(("pattern", "frozen"), [(r"layer\.0\.", "layer.0."), ("^classifier", "classifier")])
def test_what_is_frozen_holds_for_adapters_too(tmp_path: Path, pattern: str, frozen: str) -> None:
    pytest.importorskip("peft")
    given = content(tmp_path)
    before = trained(prepare(parse_recipe(given)).trainer.model)
    given["optimisation"] |= {"freeze": [pattern]}
    after = trained(prepare(parse_recipe(given)).trainer.model)
    assert before - after == {name for name in before if frozen in name} != set()


def test_what_is_frozen_holds_for_adapters_of_language_models(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the trl extra brings it")
    given = content(
        tmp_path, model="mergeready.recipes.tiny:llama", data="mergeready.demo.samples:definitions"
    )
    given["task"] = {"kind": "causal-lm", "max_tokens": 64, "lora": {"rank": 2}}
    given["optimisation"] |= {"freeze": [r"layers\.0\."]}
    names = trained(prepare(parse_recipe(given)).trainer.model)
    assert names
    assert not [name for name in names if "layers.0." in name]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_recipes_command_for_data_of_ones_own_runs_with_the_model_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """RoBERTa's classifier has no pooler; a stand-in of its architecture takes its place."""
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    RobertaModel(RobertaConfig(**SIZES, pad_token_id=0), add_pooling_layer=False).save_pretrained(
        "roberta-base"
    )
    AutoTokenizer.from_pretrained(tiny.text()).save_pretrained("roberta-base")
    for file in ("train.csv", "dev.csv"):
        Path(file).write_text("text,label\nfine,good\nawful,bad\nnice,good\nterrible,bad\n")
    path = RECIPES / "text" / f"{name}.yaml"
    lines = [line for line in path.read_text("utf-8").splitlines() if re.match(r"# +--set ", line)]
    words = shlex.split(" ".join(line.lstrip("# ").rstrip("\\") for line in lines))
    changes = [value for option, value in pairwise(words) if option == "--set"]
    assert "model=roberta-base" in changes
    prepared = prepare(read_recipe(path, [*changes, "optimisation.device=cpu"]))
    assert prepared.trainer.model.config.id2label == {0: "bad", 1: "good"}
    assert prepared.evaluations["validation"](prepared.trainer.model)["accuracy"].shape == (4,)


def test_the_base_is_the_revision_that_training_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, revision in enumerate(("main", "v1")):
        torch.manual_seed(seed)
        BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / revision)

    def downloaded(name: str, revision: str | None = None, **_: Any) -> str:
        assert name == "org/base"
        return str(tmp_path / (revision or "main"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    base = base_of("org/base", "v1")
    assert isinstance(base, Base)
    assert base.identity == Base.open(tmp_path / "v1").identity != Base.open("org/base").identity
    assert base.name == base_of("org/base", None) == "org/base"
    assert base_of(torch.nn.Linear(1, 1), None) is None
    with pytest.raises(OptionError, match="`revision` belongs to hub ids"):
        base_of(str(tmp_path / "main"), "v1")


@pytest.mark.parametrize(
    ("task", "loaded"),
    [
        ({"kind": "text-classification"}, "text"),
        ({"kind": "image-classification"}, "vit"),
        ({"kind": "image-classification", "head": "zero-shot"}, "clip"),
    ],
    ids=["text", "image", "zero-shot"],
)
@pytest.mark.parametrize("broken", ["model", "model.processor"])
def test_a_place_without_a_model_is_named(tmp_path: Path, task: Any, loaded: str, broken: str) -> None:
    (tmp_path / "nothing").mkdir()
    good, bad = f"mergeready.recipes.tiny:{loaded}", str(tmp_path / "nothing")
    model = {"name": bad, "processor": good} if broken == "model" else {"name": good, "processor": bad}
    given = content(tmp_path, model=model, task=task)
    if loaded != "text":
        given["data"] = {"name": "mergeready.demo.samples:letters", "with": {"count": 8}}
    with pytest.raises(
        OptionError, match=f"`{re.escape(broken)}` names {re.escape(bad)}, which cannot be loaded"
    ):
        prepare(parse_recipe(given))
