from __future__ import annotations

import copy

import pytest
import torch

from mergeready.errors import BaseMismatchError
from mergeready.training.scratch import scratch
from tests.models import perturb, tiny_bert


def test_a_copy_that_may_be_overwritten() -> None:
    base = tiny_bert()
    model = perturb(copy.deepcopy(base), 1, 0.02).train()
    model.requires_grad_(False)  # an expert at rest, whose weights are not the base's
    live = scratch(model, base)
    before = model.classifier.weight.clone()
    with torch.no_grad():
        live.targets["classifier.weight"].zero_()
    assert torch.equal(model.classifier.weight, before)
    assert model.training
    assert not model.classifier.weight.requires_grad
    assert not live.model.training


def test_the_base_may_be_the_model_itself() -> None:
    model = tiny_bert()
    live = scratch(model, model)
    with torch.no_grad():
        live.targets["classifier.weight"].zero_()
    assert torch.equal(live.base.source.read("classifier.weight"), model.classifier.weight)
    assert float(model.classifier.weight.abs().min()) > 0


def test_a_model_of_another_base_is_refused() -> None:
    with pytest.raises(BaseMismatchError):
        scratch(tiny_bert(seed=5), tiny_bert())
