"""Masks against per-sample gradients that are summed in a loop, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.lowest_fisher import lowest, lowest_fisher
from tests.experts.test_peft_lora import VARIANTS, trained
from tests.models import tiny_bert, token_batch
from tests.training.small import Net, equal, examples, state_of


def scores_by_loop(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Σ over examples of the squared gradient of log p of a label drawn from the model."""
    double = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(p) for name, p in double.named_parameters()}
    for one in x:
        with torch.no_grad():
            p = model.eval()(one[None]).softmax(-1)
        label = int(torch.multinomial(p, 1, generator=generator))
        log_p = double(one[None].double()).log_softmax(-1)[0, label]
        gradients = torch.autograd.grad(log_p, list(double.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient**2
    return total


def by_sorting(scores: dict[str, Tensor], count: int) -> set[tuple[str, int]]:
    entries = sorted((float(v), n, i) for n, s in scores.items() for i, v in enumerate(s.reshape(-1)))
    return {(n, i) for _, n, i in entries[:count]}


def places(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(n, int(i)) for n, m in masks.items() for i in m.reshape(-1).nonzero()}


def agreement(found: set[tuple[str, int]], exact: set[tuple[str, int]]) -> float:
    return len(found & exact) / len(exact)


def test_one_round_takes_the_lowest_scores() -> None:
    model, x = Net(), examples(1, part=0, count=20)[0]
    masks = lowest_fisher(model, [x[:7], x[7:]], share=0.2, rounds=1)
    total = sum(p.numel() for p in model.parameters())
    exact = by_sorting(scores_by_loop(model, x, 0), round(0.2 * total))
    assert len(places(masks)) == len(exact)
    assert agreement(places(masks), exact) > 0.995  # float32 may swap neighbours


def test_later_rounds_score_what_is_left_with_the_rest_damped() -> None:
    model, x = Net(), examples(1, part=0, count=12)[0]
    total = sum(p.numel() for p in model.parameters())
    inside = by_sorting(scores_by_loop(model, x, 0), round(0.25**0.5 * total))
    damped = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in damped.named_parameters():
            flat = parameter.reshape(-1)
            for i in range(len(flat)):
                if (name, i) not in inside:
                    flat[i] *= 0.1
    scores = scores_by_loop(damped, x, 1)
    for name, score in scores.items():
        flat = score.reshape(-1)
        for i in range(len(flat)):
            if (name, i) not in inside:
                flat[i] = float("inf")
    exact = by_sorting(scores, round(0.25 * total))
    found = places(lowest_fisher(model, [x], share=0.25, rounds=2))
    assert len(found) == len(exact)
    assert agreement(found, exact) > 0.98
    assert agreement(places(lowest_fisher(model, [x], share=0.25, rounds=1)), exact) < 0.97


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), min_size=2, max_size=40),
    share=st.floats(0.01, 0.99),
)
def test_exactly_the_share_and_nothing_lower_left_out(values: list[float], share: float) -> None:
    scores = {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])}
    masks = lowest(scores, share)
    flat, chosen = torch.tensor(values), torch.cat([masks["a"], masks["b"]])
    assert int(chosen.sum()) == max(round(share * len(values)), 1)
    if not bool(chosen.all()):
        assert float(flat[chosen].max()) <= float(flat[~chosen].min())


def test_the_model_stays_as_it_was_and_embeddings_are_frozen() -> None:
    model = tiny_bert().train()
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    masks = lowest_fisher(model, [token_batch(count=2)], share=0.3, rounds=2)
    assert equal(before, state_of(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert not any("embeddings.word" in name or "position_emb" in name for name in masks)
    assert "classifier.weight" in masks


def test_what_does_not_serve_is_refused() -> None:
    model, x = Net(), examples(1, part=0, count=4)[0]
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(OptionError, match="`share`"):
            lowest_fisher(model, [x], share=share)
    with pytest.raises(OptionError, match="`rounds`"):
        lowest_fisher(model, [x], rounds=0)
    with pytest.raises(OptionError, match="more than once"):
        lowest_fisher(model, iter([x]))
    with pytest.raises(UnsupportedError, match="adapter"):
        lowest_fisher(trained(VARIANTS[0])[1], [token_batch()])
