"""The technique's gradient against explicit Jacobians at the base, for whole models and adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call, jacrev

from mergeready.errors import OptionError
from mergeready.training.techniques.jacobian_penalty import JacobianPenalty
from tests.models import perturb, tiny_bert, token_batch
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.drive import net, started, train


def exact_gradient(base: Net, deltas: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """mean Jᵀ Jτ / ‖Jτ‖ by jacrev, float64."""
    model = copy.deepcopy(base).double().eval()
    start = {n: p.detach() for n, p in model.named_parameters()}
    J = jacrev(lambda w: functional_call(model, w, (x.double(),)))(start)
    moved = sum(J[n].flatten(2) @ d.double().reshape(-1) for n, d in deltas.items())
    unit = moved / moved.norm(dim=1, keepdim=True) / len(x)
    return {n: torch.einsum("ec,ec...->...", unit, J[n]) for n in deltas}


def test_whole_models() -> None:
    base = Net()
    model = perturb(copy.deepcopy(base), 1, 0.1).train()
    x, other = examples(2, 0, 6)[0], examples(3, 0, 6)[0]
    chosen = started([JacobianPenalty(inputs=[[x], [other]], strength=0.7)], model, base)
    random = torch.get_rng_state()
    for _ in chosen.passes():
        pass
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    deltas = {n: p.detach() - state_of(base)[n] for n, p in model.named_parameters()}
    exact = exact_gradient(base, deltas, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), 0.7 * exact[name], rtol=1e-3, atol=1e-5)
        parameter.grad = None
    chosen.took_step(1)
    for _ in chosen.passes():
        pass
    second = exact_gradient(base, deltas, other)  # the next peer's turn
    torch.testing.assert_close(
        model.head.weight.grad.double(), 0.7 * second["head.weight"], rtol=1e-3, atol=1e-5
    )


def test_adapters() -> None:
    model = adapter(Net())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    x = examples(2, 0, 6)[0]
    flags = [p.requires_grad for p in model.parameters()]
    chosen = started([JacobianPenalty(inputs=[[x]], strength=1.0)], model)
    for _ in chosen.passes():
        pass
    assert [p.requires_grad for p in model.parameters()] == flags
    parts = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    deltas = {}
    for name in parts:
        if "lora_B" in name:
            own = name.removeprefix("base_model.model.").split(".lora_B")[0] + ".weight"
            deltas[own] = 8 / 4 * parts[name] @ parts[name.replace("lora_B", "lora_A")]
    exact = exact_gradient(Net(), deltas, x)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            own = name.removeprefix("base_model.model.").split(".lora_B")[0] + ".weight"
            A = parts[name.replace("lora_B", "lora_A")].double()
            torch.testing.assert_close(parameter.grad.double(), 2 * exact[own] @ A.T, rtol=1e-3, atol=1e-5)
            other = dict(model.named_parameters())[name.replace("lora_B", "lora_A")]
            torch.testing.assert_close(
                other.grad.double(), 2 * parts[name].double().T @ exact[own], rtol=1e-3, atol=1e-5
            )


def test_every_batch_of_every_peer_comes_in_turn_with_the_scaler_s_factor_and_a_forward_of_your_own() -> None:
    base = Net()
    model = perturb(copy.deepcopy(base), 1, 0.1)
    inputs = [examples(task, 0, 6)[0] for task in (2, 3, 4)]
    peers = [[{"points": inputs[0]}, {"points": inputs[1]}], [{"points": inputs[2]}]]
    technique = JacobianPenalty(
        inputs=peers, strength=0.5, forward=lambda model, batch: 3 * model(batch["points"])
    )
    chosen = started([technique], model, base)
    deltas = {n: p.detach() - state_of(base)[n] for n, p in model.named_parameters()}
    for step, x in enumerate((inputs[0], inputs[2], inputs[1], inputs[2], inputs[0]), 1):
        model.zero_grad()
        for _ in chosen.passes(factor=lambda: 4.0):
            pass
        exact = 4.0 * 0.5 * 3 * exact_gradient(base, deltas, x)["head.weight"]
        torch.testing.assert_close(model.head.weight.grad.double(), exact, rtol=1e-3, atol=1e-5)
        chosen.took_step(step)


def test_a_transformer_with_fused_attention() -> None:
    base = tiny_bert()
    assert base.config._attn_implementation == "sdpa"
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    perturb(model, 2, 0.3)
    batch = token_batch(3, count=2)
    chosen = started([JacobianPenalty(inputs=[[batch]], strength=1.0)], model)
    value, gradients = chosen._running["jacobian_penalty"].penalty(batch)  # type: ignore[attr-defined]
    deltas = {
        n.removeprefix("base_model.model."): 4.0 * m.lora_B["default"].weight @ m.lora_A["default"].weight
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }

    def logits(step: float) -> Tensor:
        moved = copy.deepcopy(base).double()
        with torch.no_grad():
            for name, delta in deltas.items():
                moved.get_parameter(f"{name}.weight").add_(step * delta.double())
            return moved(**batch).logits

    scaling = model.base_model.model.bert.encoder.layer[0].attention.self.query.scaling["default"]
    change = (logits(1e-4 * scaling / 4) - logits(-1e-4 * scaling / 4)) / 2e-4
    torch.testing.assert_close(float(value), float(change.norm(dim=1).mean()), rtol=1e-3, atol=1e-6)
    assert all(bool(g.any()) for g in gradients.values())


def run(strength: float, micro: int = 1) -> dict[str, Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    technique = JacobianPenalty(inputs=[[examples(2, 0, 8)[0]]], strength=strength)
    train(started([technique], model, Net(), optimizer=optimizer), model, optimizer, 1, 8, micro=micro)
    return state_of(model)


def test_off_is_bit_identical_accumulation_agrees_and_it_helps() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(started([], model, Net()), model, optimizer, 1, 8)
    assert equal(state_of(model), run(0.0))
    one, four = run(0.5), run(0.5, micro=4)
    assert all(torch.allclose(one[n], four[n], atol=1e-5) for n in one)
    x = examples(2, 0, 8)[0]
    with torch.no_grad():
        start = Net().eval()(x)
        changes = []
        for state in (state_of(model), one):
            moved = net()
            moved.load_state_dict(state)
            changes.append(float((moved.eval()(x) - start).norm()))
    assert changes[1] < 0.7 * changes[0]


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="`inputs`"):
        JacobianPenalty(inputs=torch.ones(2, 3))
    with pytest.raises(OptionError, match="`inputs`"):
        JacobianPenalty(inputs=[])
    with pytest.raises(OptionError, match="`strength`"):
        JacobianPenalty(inputs=[[torch.ones(1)]], strength=-1)
    with pytest.raises(OptionError, match="more than once"):
        JacobianPenalty(inputs=[iter([torch.ones(1)])])
    with pytest.raises(OptionError, match="`batches` is empty"):
        started([JacobianPenalty(inputs=[[]])], Net(), Net())
