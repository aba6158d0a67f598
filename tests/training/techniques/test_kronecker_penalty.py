"""The gradient that the technique adds, whole and through factors, against finite differences in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergeready import KroneckerFactors, kronecker_factors, sum_factors
from mergeready.errors import BaseMismatchError, MismatchError, OptionError
from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty
from tests.models import perturb
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.drive import net, started, train


def factors_of(task: int) -> KroneckerFactors:
    return kronecker_factors(Net(), [examples(task, 0, 24)[0]], base=Net(), label=str(task))


def penalty(total: KroneckerFactors, deltas: dict[str, Tensor]) -> Tensor:
    """Σ vec([ΔW Δb])ᵀ (B ⊗ A) vec([ΔW Δb]), by dense products."""
    value = torch.zeros((), dtype=torch.float64)
    for name, layer in total.layers.items():
        B, A = (factor.double() for factor in total.read(name))
        bias = deltas.get(str(layer.bias), torch.zeros(layer.outputs).double())
        D = torch.cat([deltas.get(name, torch.zeros(layer.weight_shape).double()), bias[:, None]], 1).reshape(
            -1
        )
        value = value + D @ torch.kron(B, A) @ D
    return value


def check(parameter: nn.Parameter, value: Callable[[Tensor], Tensor], start: Tensor) -> None:
    for i in {0, parameter.numel() // 2, parameter.numel() - 1}:
        ends = []
        for sign in (1, -1):
            moved = start.clone()
            moved.view(-1)[i] += sign * 1e-4
            ends.append(float(value(moved)))
        assert parameter.grad is not None
        slope = (ends[0] - ends[1]) / 2e-4
        assert float(parameter.grad.view(-1)[i]) == pytest.approx(slope, rel=2e-3, abs=1e-5)


def test_the_gradient_of_whole_parameters(tmp_path: Path) -> None:
    base = Net()
    model = perturb(copy.deepcopy(base), 1, 0.1)
    files = [factors_of(task).save(tmp_path / f"{task}.factors.safetensors") for task in (2, 3)]
    chosen = started([KroneckerPenalty(factors=files, strength=3.0, every=1)], model, base)
    for _ in chosen.passes():
        pass
    total = sum_factors([factors_of(2), factors_of(3)])
    start = {n: t.double() for n, t in state_of(base).items()}
    deltas = {n: p.detach().double() - start[n] for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.grad is None
            continue
        check(parameter, lambda d, n=name: 3.0 * penalty(total, deltas | {n: d}), deltas[name])


def test_the_gradient_of_factors_of_an_adapter() -> None:
    model = adapter(Net())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    total = factors_of(2)
    chosen = started([KroneckerPenalty(factors=[total], strength=2.0, every=1)], model)
    for _ in chosen.passes():
        pass
    parts = {n: p.detach().double() for n, p in model.named_parameters() if "lora_" in n}
    assert parts

    def value(values: dict[str, Tensor]) -> Tensor:
        deltas = {}
        for name in values:
            if "lora_B" in name:
                base_name = name.removeprefix("base_model.model.").split(".lora_B")[0] + ".weight"
                deltas[base_name] = 8 / 4 * values[name] @ values[name.replace("lora_B", "lora_A")]
        return 2.0 * penalty(total, deltas)

    for name, parameter in model.named_parameters():
        if name in parts:
            check(parameter, lambda d, n=name: value(parts | {n: d}), parts[name])


def transposed(seed: int = 0) -> nn.Module:
    """A square weight that is stored as (inputs, outputs)."""
    torch.manual_seed(seed)
    return nn.Sequential(Conv1D(6, 6), nn.Tanh(), nn.Linear(6, 3))


def test_weights_stored_transposed() -> None:
    base = transposed()
    found = kronecker_factors(base, [examples(2, 0, 24)[0]], base=base)
    assert found.layers["0.weight"].transposed
    model = perturb(copy.deepcopy(base), 1, 0.1)
    chosen = started([KroneckerPenalty(factors=[found], strength=3.0, every=1)], model, base)
    for _ in chosen.passes():
        pass
    start = base.state_dict()
    deltas = {n: (p.detach() - start[n]).double() for n, p in model.named_parameters()}

    def value(change: Tensor) -> Tensor:
        return 3.0 * penalty(found, deltas | {"0.weight": change.T})

    check(model[0].weight, value, deltas["0.weight"])


def test_peers_weights_and_a_scaler_s_factor_count() -> None:
    gradients = []
    for weights, factor in (([0.5, 0.5], 1.0), (None, 1.0), ([1.0, 0.0], 1.0), (None, 4.0)):
        model = perturb(Net(), 1, 0.1)
        technique = KroneckerPenalty(factors=[factors_of(2), factors_of(3)], weights=weights, every=1)
        for _ in started([technique], model, Net()).passes(factor=lambda factor=factor: factor):
            pass
        gradients.append(model.head.weight.grad)
    halves, plain, first, scaled = gradients
    assert torch.equal(halves, plain)
    assert not torch.allclose(first, plain, rtol=0.1)
    torch.testing.assert_close(scaled, 4 * plain)


def run(strength: float, micro: int = 1) -> dict[str, Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    chosen = started(
        [KroneckerPenalty(factors=[factors_of(2)], strength=strength, every=1)],
        model,
        Net(),
        optimizer=optimizer,
    )
    train(chosen, model, optimizer, 1, 12, micro=micro)
    return state_of(model)


def test_switched_off_is_bit_identical_and_on_it_spares_the_peer() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(started([], model, Net()), model, optimizer, 1, 12)
    plain, off, on = state_of(model), run(0.0), run(3.0)
    assert equal(plain, off)
    start = state_of(Net())
    drift = [float(penalty(factors_of(2), {n: (s[n] - start[n]).double() for n in s})) for s in (plain, on)]
    assert drift[1] < 0.7 * drift[0]


def test_accumulation_agrees() -> None:
    one, four = run(3.0), run(3.0, micro=4)
    assert all(torch.allclose(one[n], four[n], atol=1e-5) for n in one)


def test_with_frozen_weights_the_bias_alone_is_held() -> None:
    model = Net()
    model.embed.weight.requires_grad_(False)
    with torch.no_grad():
        model.embed.bias += 0.1
    chosen = started([KroneckerPenalty(factors=[factors_of(2)], every=1)], model, Net())
    for _ in chosen.passes():
        pass
    assert model.embed.weight.grad is None
    assert float(model.embed.bias.grad.abs().max()) > 0


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="must be a list"):
        KroneckerPenalty(factors="x.factors.safetensors")
    with pytest.raises(OptionError, match="must be a list"):
        KroneckerPenalty(factors=[])
    with pytest.raises(OptionError, match="`strength`"):
        KroneckerPenalty(factors=[factors_of(2)], strength=float("nan"))
    other = perturb(Net(), 3)
    with pytest.raises(BaseMismatchError):
        started([KroneckerPenalty(factors=[factors_of(2)])], copy.deepcopy(other), other)
    model = Net().requires_grad_(False)
    model.norm.requires_grad_(True)
    with pytest.raises(MismatchError, match="of no layer that trains"):
        started([KroneckerPenalty(factors=[factors_of(2)], every=1)], model, Net())
