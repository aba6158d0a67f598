from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from mergeready.errors import OptionError
from mergeready.training.difficulty.measures import example_measures
from mergeready.training.difficulty.shares import gradient_norms, head_gradient_norms, share_of_hardest
from tests.models import tiny_bert, token_batch
from tests.training.small import Net, equal, examples, state_of


@given(
    values=st.lists(st.floats(0, 10), min_size=1, max_size=40), share=st.sampled_from([0.1, 0.25, 0.5, 1.0])
)
def test_is_the_area_beside_the_lorenz_curve(values: list[float], share: float) -> None:
    """Read off the cumulated sum, linear between examples."""
    total = sum(values)
    found = share_of_hardest(values, share)
    if total == 0:
        assert math.isnan(found)
        return
    curve = np.concatenate([[0], np.cumsum(sorted(values, reverse=True))]) / total
    assert found == pytest.approx(np.interp(share * len(values), range(len(values) + 1), curve), abs=1e-6)
    assert found >= share - 1e-6


@pytest.mark.parametrize("size", [5e-324, 1e308])
def test_values_at_the_ends_of_the_range(size: float) -> None:
    assert share_of_hardest([size], 0.1) == pytest.approx(0.1)
    assert share_of_hardest([size, size, size, 0.0], 0.25) == pytest.approx(1 / 3)


def test_an_independent_difficulty_ranks() -> None:
    values, hard = [4.0, 1.0, 2.0, 3.0], [0.0, 9.0, 8.0, 1.0]
    assert share_of_hardest(values, 0.5) == pytest.approx(0.7)
    assert share_of_hardest(values, 0.5, difficulty=hard) == pytest.approx(0.3)


def test_equal_a_direct_recomputation_on_a_real_step() -> None:
    """Losses and last-layer gradients of a batch, example by example, by autograd in float64."""
    torch.manual_seed(0)
    model = Net().double().eval()
    x, y = examples(1, 0, 40)
    caught: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits = model(x.double())
    found = example_measures(logits, y)
    losses, norms = [], []
    for i in range(40):
        loss = cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        losses.append(float(loss))
        gradients = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
    ours = head_gradient_norms(found.el2n, caught[0].detach())
    np.testing.assert_allclose(ours.numpy(), norms, rtol=1e-6)
    for mine, theirs in ((found.loss.numpy(), losses), (ours.numpy(), norms)):
        ordered = sorted(theirs, reverse=True)
        assert share_of_hardest(mine, 0.1) == pytest.approx(sum(ordered[:4]) / sum(ordered), abs=1e-6)


def test_without_a_bias_the_size_of_the_input_counts_alone() -> None:
    head = nn.Linear(3, 4, bias=False)
    h, y = torch.randn(1, 3), torch.tensor([2])
    (gradient,) = torch.autograd.grad(cross_entropy(head(h), y), head.weight)
    el2n = example_measures(head(h), y).el2n
    torch.testing.assert_close(head_gradient_norms(el2n, h, bias=False)[0], gradient.norm())


@pytest.mark.parametrize("chosen", [None, ["head.weight", "head.bias"]])
def test_gradients_of_each_example_alone(chosen: list[str] | None) -> None:
    model = Net().train()
    before = state_of(model)
    x, y = examples(1, 0, 7)
    found = gradient_norms(model, (x, y), parameters=chosen)
    assert model.training
    assert equal(before, state_of(model))
    model.eval()
    weights = [p for n, p in model.named_parameters() if chosen is None or n in chosen]
    for i in range(7):
        gradients = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), weights)
        assert float(found[i]) == pytest.approx(
            math.sqrt(sum(float(g.double().square().sum()) for g in gradients)), rel=1e-5
        )


def test_gradients_of_a_transformer() -> None:
    model = tiny_bert().eval()
    batch = token_batch(count=3) | {"labels": torch.tensor([0, 1, 2])}
    found = gradient_norms(model, batch)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        gradients = torch.autograd.grad(model(**one).loss, list(model.parameters()), allow_unused=True)
        exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        assert float(found[i]) == pytest.approx(exact, rel=1e-4)


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match=r"`share` must be in \(0, 1\], not 0"):
        share_of_hardest([1.0], 0)
    with pytest.raises(OptionError, match="finite and not negative"):
        share_of_hardest([1.0, -1.0])
    with pytest.raises(OptionError, match="2 values cannot be ranked by 1 difficulties"):
        share_of_hardest([1.0, 1.0], difficulty=[0.0])
    with pytest.raises(OptionError, match="not one vector for each of 2 examples"):
        head_gradient_norms(torch.ones(2), torch.ones(2, 3, 4))
    with pytest.raises(OptionError, match=r"tail\.weight, nose are no trained parameters of Net"):
        gradient_norms(Net(), examples(1, 0, 2), parameters=["tail.weight", "head.bias", "nose"])
