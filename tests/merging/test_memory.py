from __future__ import annotations

import pytest
import torch
from torch import nn

from mergeready.errors import NonFiniteError
from mergeready.experts import Base, open_expert
from mergeready.merging.memory import merge_state, with_state
from mergeready.merging.settings import MergeSettings
from tests.merging.worlds import Tensors, equal, state
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2


def merged(base: Tensors | nn.Module, *experts: Tensors | nn.Module, **changes: object) -> Tensors:
    opened = Base.open(base)
    found = [open_expert(expert, opened) for expert in experts]
    options = {"dtype": None, "statistics": "base"} | changes
    settings = MergeSettings.make("task_arithmetic", len(found), scale=options.pop("scale", 1.0))
    return merge_state(opened, found, settings, **options)


def test_one_expert_at_scale_one_is_that_expert_up_to_rounding() -> None:
    expert = perturb(tiny_bert(), 1)
    result = merged(tiny_bert(), expert)
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


def test_scale_zero_is_the_base_bit_for_bit() -> None:
    result = merged(tiny_bert(), perturb(tiny_bert(), 1), scale=0.0)
    assert equal(result, state(tiny_bert()))


def test_buffers_are_copied_and_counters_kept() -> None:
    base = TinyConvNet()
    result = merged(base, perturb(TinyConvNet(), 1))
    assert result["norm.num_batches_tracked"].dtype == torch.int64
    assert result["norm.running_var"].data_ptr() != base.norm.running_var.data_ptr()
    assert result["norm.num_batches_tracked"].data_ptr() != base.norm.num_batches_tracked.data_ptr()


def test_all_broken_parameters_are_named() -> None:
    bad = state(perturb(tiny_bert(), 1))
    bad["classifier.weight"][0, 0] = bad["bert.pooler.dense.bias"][1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"bert\.pooler\.dense\.bias, classifier\.weight"):
        merged(tiny_bert(), bad)


def test_a_module_with_other_weights_is_a_copy() -> None:
    module, other = tiny_gpt2(), state(tiny_gpt2(seed=3))
    copy = with_state(module, other)
    assert equal(state(copy), other)
    assert equal(state(module), state(tiny_gpt2()))
    assert copy.lm_head.weight is copy.transformer.wte.weight
    assert {p.data_ptr() for p in copy.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
