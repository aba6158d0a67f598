from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from mergeready.experts import dense, open_expert
from mergeready.training.base_of_run import base_of_run
from mergeready.training.save import save_expert
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, token_batch
from tests.training.small import Net, equal, expert, state_of


class Tied(nn.Module):
    """Output weights are the embedding's, and come later in the module but earlier in the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.answer = nn.Linear(4, 8, bias=False)
        self.answer.weight = self.words.weight
        self.register_buffer("passing", torch.ones(2), persistent=False)


def saved(model: nn.Module, folder: Path, processor: object = None) -> Path:
    folder.mkdir()
    save_expert(model, folder, processor)
    return folder


def difference(folder: Path, base: object) -> dict[str, Tensor]:
    vector = open_expert(folder, base).vector  # type: ignore[arg-type]
    return {name: dense(vector[name]) for name in vector}


@pytest.mark.parametrize("make", [Net, TinyConvNet, Tied, tiny_bert, tiny_gpt2])
def test_a_saved_model_opens_as_an_expert_on_the_runs_own_base(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    start = dict(copy.deepcopy(model).named_parameters())
    base = base_of_run(model, None, tmp_path, step=0, recorded=None)
    assert base is not None
    perturb(model, 1)
    found = difference(saved(model, tmp_path / "expert"), base)
    trained = dict(model.named_parameters())
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], (value - start[name]).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["default", "law"])
def test_an_adapter_is_saved_alone_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    """Preference training keeps the start as a second adapter, and PEFT gives names folders of their own."""
    config = LoraConfig(r=2, target_modules=["query"])
    model = get_peft_model(tiny_bert(), config, adapter_name=name)
    perturb(model, 1)
    model.add_adapter("reference", config)
    model.set_adapter(name)
    folder = saved(model, tmp_path / "expert")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    found = difference(folder, tiny_bert())
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    expected = layer.get_delta_weight(name).detach()
    torch.testing.assert_close(found["bert.encoder.layer.0.attention.self.query.weight"], expected)


@pytest.mark.parametrize("make", [Net, TinyConvNet, Tied])
def test_a_plain_module_loads_again(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """With the safetensors library's own loader."""
    model = perturb(make(), 1)
    folder = saved(model, tmp_path / "expert")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    again = make()
    assert load_model(again, folder / "model.safetensors") == (set(), [])
    assert equal(state_of(again), state_of(model))


def test_a_tied_module_opens_on_the_module_itself(tmp_path: Path) -> None:
    folder = saved(perturb(Tied(), 1), tmp_path / "expert")
    assert difference(folder, Tied()).keys() == {"words.weight", "body.weight", "body.bias"}
    with safe_open(
        folder / "model.safetensors", "pt"
    ) as file:  # as the library notes names that it leaves out
        assert file.metadata() == {"format": "pt", "answer.weight": "words.weight"}


def test_a_transformers_model_loads_again(tmp_path: Path) -> None:
    model = perturb(tiny_bert(), 1)
    again = BertForSequenceClassification.from_pretrained(saved(model, tmp_path / "expert"))
    assert equal(state_of(again), state_of(model))


def test_a_peft_model_saves_its_adapter(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    model = perturb(model, 1, 0.1).eval()
    folder = saved(model, tmp_path / "expert")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    found = difference(folder, tmp_path / "base")
    applied = tiny_bert()
    with torch.no_grad():
        for name, delta in found.items():
            applied.get_parameter(name).add_(delta)
        batch = token_batch()
        torch.testing.assert_close(applied(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    found = difference(saved(DistributedDataParallel(expert(1)), tmp_path / "expert"), Net())
    assert found.keys() == dict(Net().named_parameters()).keys()


def test_a_transposed_parameter(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    base = copy.deepcopy(model)
    model.weight = nn.Parameter((model.weight.detach() + 0.01).T.contiguous().T)
    assert not model.weight.is_contiguous()
    found = difference(saved(model, tmp_path / "expert"), base)
    torch.testing.assert_close(found["weight"], torch.full((2, 3), 0.01), rtol=1e-4, atol=1e-7)


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text(json.dumps({}))


@pytest.mark.parametrize("make", [Net, tiny_bert])
def test_the_processor_goes_along(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = saved(make(), tmp_path / "expert", Processor())
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("processor", [None, lambda text: text])
def test_what_cannot_be_saved_beside_it_is_left_out(processor: object, tmp_path: Path) -> None:
    assert [p.name for p in saved(Net(), tmp_path / "expert", processor).iterdir()] == ["model.safetensors"]
