"""Filters and starts of adapters as techniques: what trains, what conflicts, what a resumed run does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mergeready import kronecker_factors
from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.lora_start import lora_a
from mergeready.training.techniques.lora_start import OrthogonalStart, SharedLoraA
from mergeready.training.techniques.technique_set import TechniqueSet
from mergeready.training.techniques.train_only import TrainOnly
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.drive import adamw, net, started, train


def fresh() -> nn.Module:
    """An adapter that changes nothing yet."""
    model = adapter(net())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


def test_only_what_a_filter_keeps_moves_though_the_optimizer_has_all() -> None:
    model = net()
    optimizer = adamw(model)
    before = state_of(model)
    chosen = started([TrainOnly(keep="linear", also="^norm")], model, Net(), optimizer=optimizer)
    train(chosen, model, optimizer, 1, 3)
    changed = {n for n, t in state_of(model).items() if not torch.equal(t, before[n])}
    assert changed == {
        n for n in before if n.startswith("norm") or (n.endswith("weight") and "norm" not in n)
    }


def test_a_shared_a_is_set_at_the_start_and_only_frozen_on_resume() -> None:
    model = fresh()
    optimizer = adamw(model)
    train(started([SharedLoraA(seed=11)], model, optimizer=optimizer), model, optimizer, 1, 3)
    own = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    for name, A in own.items():
        base_name = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
        assert torch.equal(A, lora_a(base_name, rank=A.shape[0], inputs=A.shape[1], seed=11))
        assert not A.requires_grad
    again = copy.deepcopy(model)
    for name, p in again.named_parameters():
        p.requires_grad_("lora_" in name)
    before = state_of(again)
    started([SharedLoraA(seed=11)], again, step=3)
    assert all(torch.equal(t, before[n]) for n, t in state_of(again).items())
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_A" in n)


def test_an_orthogonal_start_sees_less_of_peers() -> None:
    x = examples(2, 0, 20)[0]
    made = kronecker_factors(Net(), [x], base=Net())
    shares = []
    for techniques in ([], [OrthogonalStart(inputs=[made])]):
        model = fresh()
        started(techniques, model)
        A = next(p for n, p in model.named_parameters() if "layers.0.lora_A" in n).detach()
        gram = made.read("layers.0.weight")[1][:16, :16]
        shares.append(float(((A @ gram) * A).sum() / (A.square().sum() * gram.trace())))
    assert shares[1] < 0.1 * shares[0]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_resumed_run_does_not_start_orthogonal_again(freeze: bool) -> None:
    made = kronecker_factors(Net(), [examples(2, 0, 20)[0]], base=Net())
    technique = OrthogonalStart(inputs=[made], freeze=freeze)
    model = fresh()
    started([technique], model)
    own = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    assert all(A.requires_grad is not freeze for A in own.values())
    with torch.no_grad():
        for A in own.values():
            A.mul_(2).requires_grad_(True)
    before = state_of(model)
    started([technique], model, step=3)
    assert equal(state_of(model), before)
    assert all(A.requires_grad is not freeze for A in own.values())


def test_two_starts_are_refused_with_the_reason() -> None:
    made = kronecker_factors(Net(), [examples(2, 0, 20)[0]], base=Net())
    with pytest.raises(OptionError, match="both change the weights before the first step"):
        TechniqueSet([SharedLoraA(), OrthogonalStart(inputs=[made])])
    with pytest.raises(OptionError, match="`inputs`"):
        OrthogonalStart(inputs="x.factors.safetensors")


def test_after_ddp_has_counted_it_is_too_late() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = adapter(Net())

    made = kronecker_factors(Net(), [examples(2, 0, 20)[0]], base=Net())
    for technique in (TrainOnly(), SharedLoraA(), OrthogonalStart(inputs=[made], freeze=True)):
        with pytest.raises(UnsupportedError, match="before the model is wrapped"):
            TechniqueSet([technique]).prepare(DistributedDataParallel(), step=0)
