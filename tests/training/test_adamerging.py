"""AdaMerging's derivatives against finite differences of an entropy in float64, and what its coefficients do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from mergeready import adamerging, merge
from mergeready.errors import NonFiniteError, OptionError
from mergeready.experts import open_expert
from mergeready.training.adamerging import _held, _Learner, entropy, inner
from mergeready.training.batches import forward_logits
from mergeready.training.scratch import scratch
from tests.models import perturb, tiny_bert, token_batch
from tests.training.small import Net, examples, expert


def data(task: int, count: int = 3) -> list[Tensor]:
    return [examples(task, part, 16)[0] for part in range(count)]


def mean_entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits, -1)
    return -(p * torch.log(p)).sum(-1).mean()


def summed_entropy(
    base: Net, experts: list[nn.Module], coefficients: dict[str, list[float]], batches: list[Tensor]
) -> Tensor:
    """Σ over tasks of the mean entropy at θ₀ + Σ λ τ, in float64."""
    ends = [dict(e.named_parameters()) for e in experts]
    weights = {
        name: p.double()
        + sum(c * (end[name].double() - p.double()) for c, end in zip(coefficients[name], ends, strict=True))
        for name, p in base.named_parameters()
    }
    model = copy.deepcopy(base).double().eval()
    with torch.no_grad():
        return sum(mean_entropy(functional_call(model, weights, (x.double(),))) for x in batches)


def test_derivatives_equal_finite_differences() -> None:
    base, experts = Net(), [expert(1), expert(2)]
    batches = [data(1)[0], data(2)[0]]
    live = scratch(base, base)
    learner = _Learner(live, [_held(open_expert(e, live.base).vector, live) for e in experts])
    names = learner._names
    start = torch.linspace(0.1, 0.6, 2 * len(names), dtype=torch.float64).reshape(-1, 2)
    learner._write(start)
    found = torch.zeros_like(start)
    learner._accumulate(found, batches, [forward_logits] * 2)
    step = 1e-4
    for i, k in itertools.product(range(len(names)), range(2)):
        sides = []
        for sign in (1, -1):
            moved = start.clone()
            moved[i, k] += sign * step
            sides.append(
                summed_entropy(base, experts, dict(zip(names, moved.tolist(), strict=True)), batches)
            )
        difference = float(sides[0] - sides[1]) / (2 * step)
        assert float(found[i, k]) == pytest.approx(difference, rel=1e-3, abs=1e-5), (names[i], k)


def test_entropy_falls_and_the_coefficients_reproduce_it_in_an_ordinary_merge() -> None:
    base, experts = Net(), [expert(1), expert(2)]
    tasks = [data(1, 1), data(2, 1)]
    learned = adamerging(base, base, experts, tasks, steps=30, lr=0.02)
    assert len(learned.entropy) == 31
    assert learned.entropy[-1] < 0.9 * learned.entropy[0]
    equal = {name: [0.3, 0.3] for name in learned.coefficients}
    start = summed_entropy(base, experts, equal, [t[0] for t in tasks])
    assert learned.entropy[0] == pytest.approx(float(start) / 2, rel=1e-5)
    merged = merge(base, experts, overrides=learned.overrides)
    with torch.no_grad():
        after = sum(float(mean_entropy(merged.eval()(t[0]))) for t in tasks) / 2
    assert after == pytest.approx(learned.entropy[-1], rel=1e-5)


def test_the_first_step_of_adam_is_the_learning_rate_long() -> None:
    base, experts = Net(), [expert(1), expert(2)]
    learned = adamerging(base, base, experts, [data(1)], steps=1, lr=0.01, initial=0.4)
    moved = torch.tensor(list(learned.coefficients.values())) - 0.4
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3, atol=0)
    assert moved.min() < 0 < moved.max()


def test_steps_take_the_next_batch_and_begin_again() -> None:
    seen: list[float] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(float(batch[0, 0]))
        return model(batch)

    base = Net()
    adamerging(base, base, [expert(1)], [data(1, 2)], steps=4, forward=forward)
    a, b = (float(batch[0, 0]) for batch in data(1, 2))
    assert seen == [a, b, a, b, a]


def test_each_task_may_have_its_own_head() -> None:
    base, experts = Net(), [expert(1), expert(2)]
    heads = [nn.Linear(3, 5), nn.Linear(3, 2)]
    runs = [lambda m, x, h=head: h(m(x)) for head in heads]
    learned = adamerging(base, base, experts, [data(1), data(2)], forward=runs, steps=3, lr=0.01)
    assert len(learned.entropy) == 4
    assert all(head.weight.grad is None for head in heads)


def test_adapters_and_full_experts_mix_and_the_model_stays_as_it_was() -> None:
    base = tiny_bert()
    adapter = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"]))
    adapter = perturb(adapter, 3, 0.1)
    full = perturb(copy.deepcopy(base), 1, 0.02)
    folder_like = {n: t.clone() for n, t in copy.deepcopy(adapter).merge_and_unload().state_dict().items()}
    batches = [[token_batch(1)], [token_batch(2)]]
    found = []
    for model in (full, adapter):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        model.train()
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        found.append(adamerging(model, base, [full, folder_like], batches, steps=3, lr=0.01))
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert model.training
    assert found[0].entropy == pytest.approx(found[1].entropy, rel=1e-5)


def test_products_with_low_rank_changes() -> None:
    from mergeready.experts import LowRank

    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 2, generator=generator), torch.randn(2, 12, generator=generator)
    g = torch.randn(6, 3, 4, generator=generator)
    exact = float((g.double().reshape(6, 12) * (B.double() @ A.double())).sum())
    assert inner(g, LowRank(B, A, (6, 3, 4))) == pytest.approx(exact, rel=1e-5)


def test_entropy_counts_real_positions() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 0] = 100.0
    logits[1, 2] = float("nan")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    exact = 4 / 5 * float(torch.log(torch.tensor(4.0)))
    assert float(entropy(logits, {"attention_mask": mask})) == pytest.approx(exact, rel=1e-6)


def test_parameters_out_of_reach_keep_their_start() -> None:
    base = tiny_bert()
    learned = adamerging(
        base,
        base,
        [perturb(copy.deepcopy(base), 1, 0.02)],
        [[token_batch(1)]],
        forward=lambda m, b: m.bert.embeddings(input_ids=b["input_ids"]).mean(1),
        steps=2,
    )
    assert learned.coefficients["classifier.weight"] == (0.3,)
    assert learned.coefficients["bert.embeddings.word_embeddings.weight"] != (0.3,)


def test_what_does_not_fit_is_refused() -> None:
    base, one = Net(), expert(1)
    for options, match in (
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": float("nan")}, "`lr` must be positive"),
        ({"initial": float("inf")}, "`initial` must be finite"),
        ({"forward": [forward_logits] * 2}, "`forward` has 2 functions for 1"),
    ):
        with pytest.raises(OptionError, match=match):
            adamerging(base, base, [one], [data(1)], **options)
    with pytest.raises(OptionError, match="at least one each"):
        adamerging(base, base, [], [data(1)])
    with pytest.raises(OptionError, match="not an iterator"):
        adamerging(base, base, [one], [iter(data(1))])
    with pytest.raises(NonFiniteError, match="entropy is NaN"):
        adamerging(base, base, [one], [[torch.full((2, 6), float("nan"))]])
