from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mergeready.errors import MismatchError
from mergeready.experts import Base
from mergeready.training.as_expert import as_expert
from tests.merging.worlds import adapted
from tests.models import perturb, tiny_bert


def test_a_plain_model_is_seen_under_its_own_names_or_the_base_s() -> None:
    model = perturb(tiny_bert(), 1, 0.02).train()
    with as_expert(model, None) as seen:
        assert seen.base is None
        assert dict(seen.tensors) == dict(model.named_parameters())
        assert not any(m.training for m in model.modules())
    base = tiny_bert().bert
    with as_expert(nn.DataParallel(model), base) as seen:
        assert seen.base == Base.open(base).identity
        assert (
            seen.tensors["encoder.layer.0.output.dense.bias"] is model.bert.encoder.layer[0].output.dense.bias
        )
        assert not any(name.startswith("classifier") for name in seen.tensors)
    assert all(m.training for m in model.modules())


def test_an_adapter_is_folded_into_the_weights_for_the_time_being() -> None:
    base = tiny_bert()
    model = adapted(base, seed=3, use_dora=True)
    made = dict(copy.deepcopy(model).merge_and_unload(safe_merge=True).named_parameters())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    for given in (base, None):
        with as_expert(model, given) as seen:
            assert set(seen.tensors) == set(made)
            for name, tensor in seen.tensors.items():
                torch.testing.assert_close(tensor, made[name], rtol=1e-5, atol=1e-6)
            model.requires_grad_(True)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags


def test_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(MismatchError), as_expert(nn.Linear(2, 2), {"weight": torch.ones(3, 2)}):
        pass
