from __future__ import annotations

import pytest
import torch
from torch import nn

from mergeready.weights import ModuleSource, SafetensorsFolder, module_parameters
from mergeready.weights.module import plain_name
from tests.models import TinyConvNet, tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("encoder.weight", "encoder.weight"),
        (
            "module.encoder.weight",
            "module.encoder.weight",
        ),  # a user's own attribute: DDP is looked through instead
        ("encoder._orig_mod.weight", "encoder.weight"),
        ("encoder._checkpoint_wrapped_module.layer._fsdp_wrapped_module.weight", "encoder.layer.weight"),
        ("encoder.module.weight", "encoder.module.weight"),  # a user's own attribute
    ],
)
def test_wrappers_leave_no_trace_in_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama, TinyConvNet])
def test_a_module_lists_what_saving_would_write(make: type[nn.Module]) -> None:
    model = make()
    source, state = ModuleSource(model), model.state_dict()
    assert set(source.infos) | set(source.aliases) == set(state)
    for name, info in source.infos.items():
        assert (info.shape, info.dtype) == (tuple(state[name].shape), state[name].dtype)
        assert torch.equal(source.read(name), state[name])
    for alias, name in source.aliases.items():
        assert state[alias].data_ptr() == state[name].data_ptr()


def test_a_saved_copy_has_the_same_names(tmp_path) -> None:
    for make in (tiny_bert, tiny_gpt2, tiny_llama):
        make().save_pretrained(tmp_path / make.__name__)
        assert set(SafetensorsFolder(tmp_path / make.__name__).infos) == set(ModuleSource(make()).infos)


def test_tied_weights_are_listed_once() -> None:
    assert ModuleSource(tiny_gpt2()).aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_wrapped_and_compiled_modules_show_plain_names() -> None:
    model = tiny_bert()
    wrapped = nn.DataParallel(torch.compile(model))
    assert any("module._orig_mod." in name for name in dict(wrapped.named_parameters()))
    assert ModuleSource(wrapped).infos == ModuleSource(model).infos
    assert module_parameters(wrapped).keys() == dict(model.named_parameters()).keys()


def test_each_read_sees_the_values_of_that_moment() -> None:
    model = nn.Linear(2, 2)
    source = ModuleSource(model)
    nn.init.constant_(model.weight, 3.0)
    assert source.read_flat("weight", 1, 3).tolist() == [3.0, 3.0]
    assert not source.read_flat("weight", 1, 3).requires_grad


def test_the_label_says_what_it_is() -> None:
    assert ModuleSource(nn.Linear(1, 1)).label == "live Linear"
    assert ModuleSource(nn.Linear(1, 1), "the model").label == "the model"
