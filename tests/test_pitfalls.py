"""Pitfalls of the frameworks that belong to no other file's subject; docs/frameworks.md lists them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from mergeready import Monitor, Schedule
from mergeready.errors import MismatchError
from tests.models import perturb, tiny_bert


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
