"""What the technique makes of weights, against a dense solution in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeready import KroneckerFactors, kronecker_factors, sum_factors
from mergeready.errors import MismatchError, OptionError, UnsupportedError
from mergeready.training.techniques.kronecker_filter import KroneckerFilter
from tests.models import perturb
from tests.sharded import adapter
from tests.training.small import Net, equal, state_of
from tests.training.techniques.drive import net, started, train
from tests.training.techniques.test_kronecker_penalty import factors_of, penalty, transposed


def solved(total: KroneckerFactors, name: str, change: Tensor, strength: float) -> Tensor:
    """(I + c B ⊗ A)⁻¹ vec(D), for D of a layer with its bias."""
    B, A = (factor.double() for factor in total.read(name))
    system = torch.eye(change.numel(), dtype=torch.float64) + strength * torch.kron(B, A)
    return torch.linalg.solve(system, change.double().reshape(-1)).reshape(change.shape)


def test_weights_and_biases_are_the_dense_solution_and_others_stay(tmp_path: Path) -> None:
    base = Net()
    model = perturb(copy.deepcopy(base), 1, 0.1)
    before = state_of(model)
    files = [factors_of(task).save(tmp_path / f"{task}.factors.safetensors") for task in (2, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    technique = KroneckerFilter(factors=files, strength=3.0, every=2)
    chosen = started([technique], model, base, optimizer=optimizer)
    train(chosen, model, optimizer, 1, 1)
    assert equal(state_of(model), before)
    train(chosen, model, optimizer, 2, 2)
    total, start, after = sum_factors([factors_of(2), factors_of(3)]), state_of(base), state_of(model)
    touched = set()
    for name, layer in total.layers.items():
        bias = str(layer.bias)
        touched |= {name, bias}
        change = layer.matrix(before[name] - start[name], before[bias] - start[bias])
        wanted = solved(total, name, change, 2 * 3.0)
        found = layer.matrix(after[name] - start[name], after[bias] - start[bias])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, change, rtol=1e-2)
    assert all(torch.equal(after[name], before[name]) for name in set(after) - touched)


def test_weights_stored_transposed() -> None:
    base = transposed()
    found = kronecker_factors(
        base, [torch.randn(24, 6, generator=torch.Generator().manual_seed(1))], base=base
    )
    model = perturb(copy.deepcopy(base), 1, 0.1)
    model[0].bias = copy.deepcopy(base[0].bias)
    before, start = state_of(model), state_of(base)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.0)
    model[0].bias.requires_grad_(False)
    chosen = started(
        [KroneckerFilter(factors=[found], strength=3.0, every=1)], model, base, optimizer=optimizer
    )
    optimizer.step()
    layer, change = found.layers["0.weight"], before["0.weight"] - start["0.weight"]
    wanted = solved(found, "0.weight", layer.matrix(change, None), 3.0)[:, :6].T
    torch.testing.assert_close(
        (model[0].weight.detach() - start["0.weight"]).double(), wanted, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(model[0].bias, before["0.bias"])
    chosen.finish_hooks()
    assert not torch.allclose(wanted.float(), change, rtol=1e-2)


def test_it_spares_the_peer() -> None:
    ends = []
    for techniques in ([], [KroneckerFilter(factors=[factors_of(2)], strength=3.0, every=4)]):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        train(started(techniques, model, Net(), optimizer=optimizer), model, optimizer, 1, 12)
        ends.append(state_of(model))
    start = state_of(Net())
    plain, on = (
        float(penalty(factors_of(2), {name: (end[name] - start[name]).double() for name in end}))
        for end in ends
    )
    assert on < 0.7 * plain


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="must be a list"):
        KroneckerFilter(factors="x.factors.safetensors")
    with pytest.raises(OptionError, match=r"`strength`.*`every`.*`rank`"):
        KroneckerFilter(factors=[factors_of(2)], strength=-1.0, every=0, rank=0)
    technique = KroneckerFilter(factors=[factors_of(2)])
    model = adapter(Net())
    with pytest.raises(UnsupportedError, match="kronecker_penalty"):
        started([technique], model, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(OptionError, match="needs one optimizer"):
        started([technique], Net(), Net())
    with pytest.raises(OptionError, match="keeps at the base"):
        started([technique, {"sparse_mask": {"masks": {}}}], Net(), Net())
    model = Net().requires_grad_(False)
    model.norm.requires_grad_(True)
    with pytest.raises(MismatchError, match="of no layer that trains"):
        started([technique], model, Net(), optimizer=torch.optim.SGD(model.norm.parameters()))
