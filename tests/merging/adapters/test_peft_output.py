"""Configurations and tensors as PEFT itself understands them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from mergeready.errors import UnsupportedError
from mergeready.experts import Base
from mergeready.experts.delta import LowRank
from mergeready.merging.adapters.changes import Changes, Factors
from mergeready.merging.adapters.peft_output import peft_config, peft_tensors, stored_factors
from tests.models import tiny_bert

BERT = tiny_bert()
BASE = Base.open(BERT)
NAMES = [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)]
DENSE = "bert.encoder.layer.0.attention.output.dense"


def factors(name: str, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = BASE.source.infos[name].shape
    B, A = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return Factors("linear", LowRank(B, A, (rows, columns)))


def made(**values: Tensor) -> Changes:
    found = Changes({name: factors(name, rank, rank) for name, rank in zip(NAMES, (2, 5), strict=True)})
    found.values = {f"{DENSE}.{leaf}": value for leaf, value in values.items()}
    found.modules = {name: name.rpartition(".")[0] for name in (*found.factors, *found.values)}
    return found


def loaded(changes: Changes) -> nn.Module:
    model = get_peft_model(copy.deepcopy(BERT), LoraConfig(**peft_config(changes, BASE, {})))
    result = set_peft_model_state_dict(model, peft_tensors(changes, BASE, torch.float32))
    assert not result.unexpected_keys
    return model.base_model.model


def test_every_module_has_the_rank_of_its_own_factors() -> None:
    changes = made()
    model = loaded(changes)
    for name, change in changes.factors.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        expected = change.delta.B @ change.delta.A
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-5)


def test_a_module_that_is_stored_whole_brings_what_did_not_change() -> None:
    weight = torch.randn(BASE.source.infos[f"{DENSE}.weight"].shape)
    model = loaded(made(weight=weight)).get_submodule(DENSE)
    assert torch.equal(model.weight, weight)
    assert torch.equal(model.bias, BASE.source.read(f"{DENSE}.bias"))


def test_a_lone_bias_is_a_trained_bias_of_the_base() -> None:
    bias = torch.randn(BASE.source.infos[f"{DENSE}.bias"].shape)
    changes = made(bias=bias)
    assert peft_config(changes, BASE, {})["bias"] == "all"
    assert torch.equal(loaded(changes).get_submodule(DENSE).bias, bias)
    assert peft_config(made(), BASE, {})["bias"] == "none"


def test_factors_in_a_module_that_is_stored_whole_are_refused() -> None:
    changes = made(weight=torch.zeros(1))
    changes.modules[f"{DENSE}.weight"] = changes.modules[NAMES[0]]
    with pytest.raises(
        UnsupportedError, match=r"layer\.0\.attention\.self\.query would have factors and be stored"
    ):
        peft_config(changes, BASE, {})


def test_convolutions_keep_their_shape() -> None:
    weight = nn.Conv2d(3, 4, (5, 2)).weight
    delta = LowRank(torch.randn(4, 2), torch.randn(2, 30), tuple(weight.shape))
    A, B = stored_factors(Factors("linear", delta), tuple(weight.shape))
    assert (A.shape, B.shape) == ((2, 3, 5, 2), (4, 2, 1, 1))
    expected = (delta.B @ delta.A).reshape(weight.shape)
    found = torch.nn.functional.conv2d(A.transpose(0, 1), B).transpose(0, 1)  # as PEFT multiplies them
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["transposed", "embedding"])
def test_factors_of_weights_that_are_stored_the_other_way_round(kind: str) -> None:
    delta = LowRank(torch.randn(6, 2), torch.randn(2, 4), (6, 4))
    A, B = stored_factors(Factors(kind, delta), (6, 4))  # type: ignore[arg-type]  # one of the two
    torch.testing.assert_close((B @ A).T, delta.B @ delta.A)


def test_local_paths_of_the_base_are_not_published(tmp_path: Path) -> None:
    def named(base: str | None, inherited: str | None) -> object:
        fields = {"base_model_name_or_path": inherited}
        return peft_config(made(), replace(BASE, name=base), fields)["base_model_name_or_path"]

    assert named("org/base", str(tmp_path)) == "org/base"
    assert named(str(tmp_path), "org/other") == "org/other"
    assert named(str(tmp_path), None) is None
