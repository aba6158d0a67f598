"""Intruder dimensions against PEFT's own count, and of a large matrix whose directions are known."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from mergeready.errors import OptionError
from mergeready.metrics.intruders import intruders
from tests.experts.test_svd import matrix, orthonormal
from tests.models import perturb, tiny_bert


@pytest.mark.parametrize("amount", [0.05, 0.4, 1.5])
def test_intruders_are_those_that_peft_counts(amount: float) -> None:
    base = tiny_bert()
    options = LoraConfig(r=4, target_modules=["query", "value", "dense"])
    model = perturb(get_peft_model(copy.deepcopy(base), options), 3, amount)
    lines: list[str] = []
    reduce_intruder_dimension(model, logging_sink=lines.append)
    expected = {}
    for line in lines:
        name, _, count = line.partition(": ")
        if "ntruders" not in count:
            continue
        expected[name.removeprefix("base_model.model.")] = int((re.findall(r"\d+", count) or ["0"])[0])
    found = {}
    for name in expected:
        layer = model.base_model.model.get_submodule(name)
        before = base.get_submodule(name).weight.detach()
        found[name] = intruders(before, before + layer.get_delta_weight("default").detach())
    assert found == expected
    assert sum(expected.values()) > 0 or amount < 0.4


def test_intruders_of_a_large_matrix() -> None:
    base = matrix(0.97 ** torch.arange(600, dtype=torch.float64), 600, 600)
    outside = orthonormal(600, 600, 0)[:, 500:503]  # the base hardly uses them
    assert intruders(base, 1.1 * base) == 0
    assert (
        intruders(base, base + outside * torch.tensor([5.0, 4.0, 3.0]).double() @ orthonormal(600, 3, 7).T)
        == 3
    )


def test_a_base_of_zeros_has_no_directions() -> None:
    assert intruders(torch.zeros(20, 20), matrix(torch.ones(3).double(), 20, 20)) == 3


@pytest.mark.parametrize("options", [{"top": 0}, {"cosine": 0.0}, {"cosine": 1.5}])
def test_what_cannot_be_counted(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        intruders(torch.eye(3), torch.eye(3), **options)
