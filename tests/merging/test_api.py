from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mergeready.errors import BaseMismatchError, MismatchError, NonFiniteError, OptionError
from mergeready.experts import open_expert
from mergeready.merging import MergedInPlace, make_method, merge, merge_adapters, method_names
from tests.merging.methods import built
from tests.merging.worlds import World, close, equal, make_world, state, summed, tensors_of
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("method", method_names())
def test_folders_state_dicts_and_modules_give_the_same(world: World, tmp_path: Path, method: str) -> None:
    options = {"method": built(method, state(world.base), 2), "scale": 0.4, "weights": [1.0, 0.5]}
    folders = [world.folders[0], world.adapter_folder]
    in_memory = [world.experts[0], world.adapter_folder]
    folder = merge(world.base_folder, folders, output=tmp_path / "out", **options)
    assert isinstance(folder, Path)
    tensors = merge(world.base.state_dict(), in_memory, **options)
    assert isinstance(tensors, dict)
    module = merge(world.base, [state(world.experts[0]), *in_memory[1:]], **options)
    assert type(module) is type(world.base)
    assert equal(tensors_of(folder), tensors)
    assert equal(tensors, dict(module.state_dict()))


def test_values_are_those_of_the_formula(world: World) -> None:
    close(merge(state(world.base), world.experts, scale=0.3), summed(world.base, world.experts, [1, 1], 0.3))


def test_inputs_stay_as_they_are_and_share_no_memory_with_the_result(world: World) -> None:
    base, before = state(world.base), state(world.base)
    merged = merge(base, [world.adapter_folder])
    for tensor in merged.values():
        tensor.zero_()
    assert equal(base, before)
    module = tiny_bert()
    merged_module = merge(module, [perturb(tiny_bert(), 1)])
    with torch.no_grad():
        for parameter in merged_module.parameters():
            parameter.zero_()
    assert equal(state(module), state(tiny_bert()))


def test_a_module_keeps_what_is_not_weights(world: World) -> None:
    base = tiny_bert()
    base.train()
    base.bert.eval()
    base.classifier.weight.requires_grad_(False)
    merged = merge(base, world.experts)
    assert [m.training for m in merged.modules()] == [m.training for m in base.modules()]
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in base.parameters()]
    assert merged.config is not base.config
    assert merged.config.to_dict() == base.config.to_dict()


def test_buffers_that_no_checkpoint_holds_stay_in_a_module(tmp_path: Path) -> None:
    base, expert = tiny_llama(), perturb(tiny_llama(), 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    merged = merge(base, [tmp_path / "expert"])
    assert torch.equal(merged.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)
    with torch.no_grad():
        batch = token_batch()
        torch.testing.assert_close(merged(**batch).logits, expert(**batch).logits, rtol=1e-5, atol=1e-5)
    folder = merge(tmp_path / "base", [expert], output=tmp_path / "out")
    assert equal(tensors_of(folder), state(merged))


def test_a_wrapped_module_is_merged_under_its_plain_names(world: World) -> None:
    wrapped = nn.DataParallel(torch.compile(world.base))
    merged = merge(wrapped, world.experts)
    assert type(merged) is nn.DataParallel
    expected = merge(world.base, world.experts)
    assert equal(state(merged.module._orig_mod), state(expected))


def test_tied_weights_stay_tied() -> None:
    base, expert = tiny_gpt2(), perturb(tiny_gpt2(), 1)
    module = merge(base, [expert])
    assert module.lm_head.weight is module.transformer.wte.weight
    tensors = merge(base.state_dict(), [expert])
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]
    assert tensors.keys() == base.state_dict().keys()
    assert torch.equal(tensors["lm_head.weight"], module.lm_head.weight)


def test_another_dtype(world: World) -> None:
    merged = merge(state(world.base), world.experts, dtype=torch.float64)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float64}
    close(merged, summed(world.base, world.experts, [1, 1], 1.0))
    untouched = merge(state(world.base), [world.adapter_folder], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in untouched.values()} == {torch.bfloat16}
    assert torch.equal(untouched["classifier.bias"], world.base.classifier.bias.bfloat16())


@pytest.mark.parametrize("how", ["base", "average"])
def test_running_statistics(how: str) -> None:
    base, expert = TinyConvNet(), perturb(TinyConvNet(), 1)
    expert.train()(torch.randn(8, 3, 6, 6))
    merged = merge(base, [expert], statistics=how)
    source = base if how == "base" else expert
    torch.testing.assert_close(merged.norm.running_var, source.norm.running_var)
    assert int(merged.norm.num_batches_tracked) == 0


def test_a_method_object_and_its_name_are_the_same(world: World) -> None:
    named = merge(state(world.base), world.experts, "ties", density=0.3)
    made = merge(state(world.base), world.experts, make_method("ties", density=0.3))
    assert equal(named, made)
    assert not equal(named, merge(state(world.base), world.experts, "ties", density=0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "x"}, "only merges of folders have `output`"),
        ({"weights": [1.0]}, "`weights` has 1 values for 2 experts"),
        ({"scale": float("nan")}, "`scale` must be finite"),
        ({"method": "tis"}, "there is no merge method"),
        ({"method": "ties", "rho": 1}, "ties has no parameter rho"),
        ({"dtype": torch.int8}, "`dtype` must be a floating dtype"),
        ({"dtype": torch.float8_e5m2}, "`dtype` must be a floating dtype"),
        ({"statistics": "mean"}, "`statistics` must be base or average"),
    ],
)
def test_options_are_checked(world: World, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merge(state(world.base), world.experts, **options)


def test_a_single_expert_is_no_list(world: World, tmp_path: Path) -> None:
    """The letters of a path would be looked for as models on the hub."""
    opened = open_expert(world.folders[0], world.base)
    for expert in (str(world.folders[0]), world.folders[0], world.experts[0], opened, opened.vector):
        with pytest.raises(OptionError, match="`experts` must be a list, also where there is only one"):
            merge(world.base, expert)
        with pytest.raises(OptionError, match="`experts` must be a list"):
            merge_adapters(world.base, expert, tmp_path / "out")
        with pytest.raises(OptionError, match="`experts` must be a list"):
            MergedInPlace(world.experts[0], world.base, expert)


def test_a_folder_needs_an_output_and_a_module_has_its_dtype(world: World) -> None:
    with pytest.raises(OptionError, match="`output` is needed"):
        merge(world.base_folder, world.folders)
    with pytest.raises(OptionError, match="`dtype` cannot be chosen for a module"):
        merge(world.base, world.experts, dtype=torch.bfloat16)
    for base in (world.base, state(world.base)):
        with pytest.raises(OptionError, match="`experts` is empty"):
            merge(base, [])


def test_inputs_are_checked(world: World) -> None:
    with pytest.raises(BaseMismatchError, match="does not descend"):
        merge(state(world.base), [tiny_bert(seed=5)])
    more = state(world.experts[0]) | {"own.head": torch.ones(2)}
    with pytest.raises(MismatchError, match=r"own\.head"):
        merge(state(world.base), [more])
    assert "own.head" not in merge(state(world.base), [more], strict=False)


@pytest.mark.parametrize("method", method_names())
def test_nan_is_named(world: World, method: str) -> None:
    bad = state(world.experts[0])
    bad["classifier.weight"][0, 0] = float("nan")
    for base in (state(world.base), world.base):
        with pytest.raises(NonFiniteError, match=r"values in state dict: classifier\.weight"):
            merge(base, [world.experts[1], bad], built(method, state(world.base), 2))
