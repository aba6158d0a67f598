"""Pitfalls of the frameworks that belong to no other file's subject; docs/frameworks.md lists them all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM, Trainer
from transformers.trainer_utils import HPSearchBackend

from mergeready import Monitor, Probe, Schedule, read_history
from mergeready.errors import MismatchError, UnsupportedError
from mergeready.experts import open_expert
from mergeready.recipes import parse_recipe
from mergeready.recipes.run import prepare
from mergeready.transformers import MergeReadyCallback
from tests.models import perturb, tiny_bert
from tests.ranks import run_ranks
from tests.recipes.test_run import content
from tests.trainers import Tokens, arguments, make_trainer


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A checkpoint whose experts are stored apart, as Mixtral's are; transformers 5 stacks them as it loads."""
    tiny_mixtral().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_stacked_experts_do_not_fit_a_folder_that_stores_them_apart(mixture: Path, tmp_path: Path) -> None:
    """By name alone, most of the model would count as unchanged."""
    monitor = Monitor(base=mixture, measure=Schedule(every=1))
    with pytest.raises(MismatchError, match=r"stacked in one .*gate_up_proj.*loaded models"):
        monitor.start(MixtralForCausalLM.from_pretrained(mixture), tmp_path / "run")


@pytest.mark.parametrize("given", ["a loaded model", "nothing"])
def test_stacked_experts_are_measured_against_a_loaded_base(
    mixture: Path, tmp_path: Path, given: str
) -> None:
    """Without `base`, the folder of origin does not do, and the first weights are written down."""
    model: Any = MixtralForCausalLM.from_pretrained(mixture)
    base = MixtralForCausalLM.from_pretrained(mixture) if given == "a loaded model" else None
    monitor = Monitor(base=base, measure=Schedule(every=1))
    monitor.start(model, tmp_path / "run")
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    perturb(model, 1)
    monitor.on_step(1)
    exact = sum(float((p.detach().double() - before[n]).square().sum()) for n, p in model.named_parameters())
    assert monitor.history.metrics[-1].norm == pytest.approx(exact**0.5, rel=1e-6)
    assert (tmp_path / "run/base").exists() == (base is None)


def test_a_checkpoint_in_16_bits_is_loaded_in_16_bits_and_said_to_be(tmp_path: Path) -> None:
    """`from_pretrained` keeps the dtype of the checkpoint."""
    tiny_bert().bfloat16().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    monitor = Monitor(base=tmp_path / "base", measure=Schedule(every=1))
    monitor.start(model, tmp_path / "run")
    perturb(model, 1, 1e-3)
    monitor.on_step(1)
    record = monitor.history.metrics[-1]
    assert 0.1 < (record.resolution or 0) < 10
    assert 0 < (record.unchanged or 0) < 1


def trial(number: int) -> Any:
    return SimpleNamespace(number=number, params={})


def test_trials_of_a_hyperparameter_search_keep_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer saves each under `run-<trial>`; in one folder, the second would take the first one's picks away."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    tiny_bert().save_pretrained(tmp_path / "base")
    options = {"base": tmp_path / "base", "measure": Schedule(every=1), "techniques": ["weight_average"]}
    trainer = Trainer(
        args=arguments(tmp_path / "search", max_steps=2, save_strategy="steps", save_steps=2),
        model_init=lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        train_dataset=Tokens(),
        callbacks=[MergeReadyCallback(**options)],
    )
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    for number in range(2):
        trainer.train(trial=trial(number))
    for number in range(2):
        folder = tmp_path / f"search/run-{number}"
        assert [record.step for record in read_history(folder / "mergeready/history.jsonl").metrics] == [1, 2]
        assert (folder / "checkpoint-2/mergeready_techniques.safetensors").is_file()
    assert not (tmp_path / "search/mergeready").exists()


class Odd:
    """An evaluation whose values are what libraries return: numbers that JSON does not know."""

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        return {"f1": np.float32(0.5), "n": torch.tensor(3), "name": "set"}


def test_states_are_json_whatever_an_evaluation_returns(tmp_path: Path) -> None:
    """The Trainer writes callbacks' states with `json`, which raises at tensors and at fp32 of numpy."""
    tiny_bert().save_pretrained(tmp_path / "base")
    probe = Probe(evaluate=Odd(), metric="f1", schedule=Schedule(every=1))
    callback = MergeReadyCallback(base=tmp_path / "base", probe=probe)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "run", callback, model=model, **options).train()
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    history = state["stateful_callbacks"]["mergeready"]["attributes"]["history"]
    assert [record["expert"]["value"] for record in history if record["kind"] == "probe"] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "."])
def test_shards_of_a_distributed_checkpoint_are_named(tmp_path: Path, name: str) -> None:
    """What FSDP saves with SHARDED_STATE_DICT holds no model.safetensors."""
    tiny_bert().save_pretrained(tmp_path / "base")
    folder = tmp_path / "checkpoint-4"
    dcp.save({"model": tiny_bert().state_dict()}, checkpoint_id=folder / name)
    with pytest.raises(UnsupportedError, match=r"checkpoint-4 holds the shards .*accelerate merge-weights"):
        open_expert(folder, tmp_path / "base")


def gradient_norm(folder: Path, size: int) -> float:
    """Of the first step of a recipe: ``size`` examples a process, on as many processes as there are."""
    if dist.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    changes = {"batch_size": size, "steps": 1, "log_every": 1, "save_every": None}
    trainer = prepare(parse_recipe(content(folder, **changes))).trainer
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Left to itself, the Trainer multiplies the gradient of classifiers by the number of processes."""
    alone = gradient_norm(tmp_path / "alone", 8)
    assert run_ranks(gradient_norm, 2, tmp_path / "two", 4) == pytest.approx([alone, alone], rel=1e-4)
