"""A linear model on inputs that span a part of its space: what distillation has to find is known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeready import DistilledFinish, NormGovernor, Peer, PeerProjection, SparseMask, WeightAverage
from mergeready.errors import OptionError
from mergeready.training.techniques.norms import scale_change, task_norm
from mergeready.training.techniques.technique_set import TechniqueSet
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, expert, state_of
from tests.training.techniques.drive import net, started
from tests.training.techniques.runs import run

X = torch.zeros(40, 6)
X[:, :3] = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))  # the last three inputs never act


def linear(scale: float) -> nn.Linear:
    """A base, or an expert at ``scale`` times its change."""
    model = nn.Linear(6, 4, bias=False)
    generator = torch.Generator().manual_seed(2)
    base, change = (torch.randn(4, 6, generator=generator) for _ in range(2))
    with torch.no_grad():
        model.weight.copy_(base + scale * change)
    return model


def finished(technique: DistilledFinish, model: nn.Module, **options: Any) -> dict[str, float]:
    chosen = started([technique], model, linear(0.0), **options)
    chosen.finish()
    return {name.removeprefix("distilled_finish/"): value for name, value in chosen.scalars().items()}


def seen(weight: Tensor) -> Tensor:
    """What of a weight the outputs tell: where inputs act, up to a constant that all classes share."""
    return (weight - weight.mean(0))[:, :3]


def test_the_outputs_are_those_of_the_expert_at_a_smaller_norm() -> None:
    base, model = linear(0.0).weight.detach(), linear(0.5)
    teacher = model.weight.detach().clone()
    norm = 0.6 * float((teacher - base).norm())
    technique = DistilledFinish(
        inputs=[X],
        norm=norm,
        steps=600,
        lr=0.02,
        teacher_temperature=2.0,
        student_temperature=2.0,
        anchor=0.0,
    )
    figures = finished(technique, model)
    torch.testing.assert_close(model(X).softmax(1), (X @ teacher.T).softmax(1), atol=2e-4, rtol=0)
    torch.testing.assert_close(seen(model.weight.detach()), seen(teacher), atol=5e-3, rtol=0)
    hidden = base[:, 3:] + 0.6 * (teacher - base)[:, 3:]  # no gradient reaches it
    torch.testing.assert_close(model.weight.detach()[:, 3:], hidden)
    now = float((model.weight.detach() - base).norm())
    assert figures["norm"] == pytest.approx(now, rel=1e-5)
    assert figures["norm_before"] == pytest.approx(norm / 0.6, rel=1e-5)
    assert now < 0.95 * norm / 0.6
    assert figures["agreement"] == 1.0
    assert figures["confidence"] == pytest.approx(figures["confidence_before"], abs=1e-4)


def test_a_warmer_student_ends_with_logits_as_much_larger() -> None:
    model = linear(0.1)
    teacher = model.weight.detach().clone()
    technique = DistilledFinish(
        inputs=[X], steps=1500, lr=0.03, teacher_temperature=1.0, student_temperature=3.0, anchor=0.0
    )
    figures = finished(technique, model)
    torch.testing.assert_close(seen(model.weight.detach()), 3 * seen(teacher), atol=2e-2, rtol=0)
    assert figures["confidence"] > figures["confidence_before"] + 0.1


def test_the_gradient_is_that_of_the_loss() -> None:
    """One step of Adam moves every weight by the learning rate against the sign of the gradient: float64, by hand."""
    model = linear(0.5)
    base, teacher = linear(0.0).weight.detach().double(), model.weight.detach().double()
    technique = DistilledFinish(
        inputs=[X], norm=1e-2, steps=1, lr=1e-4, teacher_temperature=2.0, student_temperature=5.0, anchor=0.0
    )
    finished(technique, model)
    start = base + (1e-2 / (teacher - base).norm()) * (teacher - base)
    x = X.double()
    error = (x @ start.T / 5).softmax(1) - (x @ teacher.T / 2).softmax(1)
    gradient = 2 * error.T @ x / len(x)
    torch.testing.assert_close(
        (model.weight.detach().double() - start), -1e-4 * gradient.sign(), atol=1e-6, rtol=0
    )


def test_an_anchor_holds_it_where_it_begins() -> None:
    base, teacher = linear(0.0).weight.detach(), linear(0.5).weight.detach()
    start = base + 0.5 * (teacher - base)
    left = []
    for anchor in (0.0, 100.0):
        model = linear(0.5)
        norm = 0.5 * float((teacher - base).norm())
        finished(DistilledFinish(inputs=[X], norm=norm, steps=200, lr=0.01, anchor=anchor), model)
        left.append(float((model.weight.detach() - start).norm()))
    assert left[1] < 0.1 * left[0]


def test_a_norm_that_is_small_enough_is_left_alone() -> None:
    model = linear(0.5)
    before = state_of(model)
    assert finished(DistilledFinish(inputs=[X], norm=1e3), model) == {}
    assert equal(state_of(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_16_bit_weights_add_up(dtype: torch.dtype) -> None:
    """A step of 1e-4 is below half the spacing of most of these weights."""
    model = linear(0.5).to(dtype)
    before = model.weight.detach().clone()
    technique = DistilledFinish(
        inputs=[X.to(dtype)],
        steps=300,
        lr=1e-4,
        teacher_temperature=1.0,
        student_temperature=10.0,
        anchor=0.0,
    )
    chosen = started([technique], model, linear(0.0).to(dtype))
    chosen.finish()
    moved = (model.weight.detach() - before).float()[:, :3].abs()
    assert float(moved.mean()) > 0.01  # the sum of the rates is 0.015
    assert model.weight.dtype is dtype


def test_the_peers_median_is_the_norm(tmp_path: Path) -> None:
    base = Net().state_dict()
    states = [state_of(expert(task, steps)) for task, steps in ((2, 2), (2, 3), (3, 60))]
    norms = [float(sum((s[n] - base[n]).double().square().sum() for n in base) ** 0.5) for s in states]
    peers = [Peer(state, name=f"peer {i}") for i, state in enumerate(states)]
    technique = DistilledFinish(inputs=[examples(1, 0, 16)[0]], steps=1, lr=1e-9, anchor=0.0)
    end = run(tmp_path, [technique], peers=peers, steps=12)
    norm = float(sum((end[n] - base[n]).double().square().sum() for n in base) ** 0.5)
    assert norm == pytest.approx(sorted(norms)[1], rel=1e-4)
    own = {n: t for n, t in run.before_the_end.items() if n not in base}  # type: ignore[attr-defined]
    assert all(torch.equal(end[n], t) for n, t in own.items())


def test_an_adapter_is_taught_and_its_base_stays() -> None:
    model = adapter(net())
    before = state_of(model)
    x = examples(1, 0, 32)[0]
    with torch.no_grad():
        expected = model.eval()(x).softmax(1)
        technique = DistilledFinish(inputs=[x], norm=0.8, steps=150, lr=0.02, anchor=0.0)
        chosen = started([technique], model.train())
        weights = chosen.run.weights.values()
        share = 0.8 / task_norm(chosen.run)
        scale_change(weights, share)
        shrunk = float((model.eval()(x).softmax(1) - expected).abs().mean())
        scale_change(weights, 1 / share)
    model.train()
    chosen.finish()
    after = state_of(model)
    assert all(
        torch.equal(after[n], before[n]) for n in after if "lora_" not in n and "modules_to_save" not in n
    )
    with torch.no_grad():
        assert float((model.eval()(x).softmax(1) - expected).abs().mean()) < 0.2 * shrunk


def test_the_expert_is_back_if_it_raises_on_the_way() -> None:
    model, calls = linear(0.5), 0
    before = state_of(model)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("out of memory")
        return model(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        finished(DistilledFinish(inputs=[X], norm=0.5, forward=forward, lr=0.1), model)
    assert calls == 8
    assert equal(state_of(model), before)
    assert model.weight.requires_grad


def test_buffers_modes_and_random_state_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    base = {n: t - 0.1 if n == "0.weight" else t.clone() for n, t in model.state_dict().items()}
    buffers = [buffer.clone() for buffer in model.buffers()]
    chosen = started([DistilledFinish(inputs=[X], norm=0.1, steps=3)], model, base)
    torch.manual_seed(3)
    chosen.finish()
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert all(map(torch.equal, buffers, model.buffers()))
    assert model[2].training
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_go_together() -> None:
    finish = DistilledFinish(inputs=[X], norm=1.0)
    given = {"0": torch.ones(1)}
    for other in (SparseMask(masks=given), PeerProjection(), WeightAverage()):
        with pytest.raises(OptionError, match=r"undo what the other|both change the weights at the end"):
            TechniqueSet([finish, other])
    TechniqueSet([finish, NormGovernor(max_norm=1.0)])


def test_what_does_not_serve_is_refused() -> None:
    for wrong in (
        {"norm": 0.0},
        {"steps": 0},
        {"lr": 0.0},
        {"teacher_temperature": 0.0},
        {"student_temperature": float("inf")},
        {"anchor": -1.0},
    ):
        with pytest.raises(OptionError, match=f"`{next(iter(wrong))}`"):
            DistilledFinish(inputs=[X], **wrong)
    with pytest.raises(OptionError, match="more than once"):
        DistilledFinish(inputs=iter([X]))
    with pytest.raises(OptionError, match="list of batches"):
        DistilledFinish(inputs=X)
    with pytest.raises(OptionError, match="needs `norm`, or peers"):
        started([DistilledFinish(inputs=[X])], linear(0.5), linear(0.0))
