from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import make_method
from tests.merging.formulas import (
    close,
    golden,
    golden_deltas,
    grids,
    mean_of,
    merged,
    relative_error,
    several_chunks,
)

positive = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])


def cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.double().norm() * b.double().norm())
    return float((a.double() * b.double()).sum()) / length if length else 0.0


def paper(deltas: list[Tensor], factors: list[float]) -> Tensor:
    """Jang et al.: t = N cos θ / (1 + (N - 1) cos θ), with the mean of all pairs' cosines."""
    chosen = [delta for delta, weight in zip(deltas, factors, strict=True) if weight != 0]
    count = len(chosen)
    ratio = 1.0
    if count > 1:
        found = [cosine(a, b) for a, b in itertools.combinations(chosen, 2)]
        mean = max(0.0, math.fsum(found) / len(found))
        ratio = count * mean / (1 + (count - 1) * mean)
    return ratio * mean_of(deltas, factors)


@given(deltas=grids(), data=st.data())
def test_is_the_paper_s_formula(deltas: list[Tensor], data: st.DataObject) -> None:
    factors = [data.draw(positive) for _ in deltas]
    ours = merged(make_method("model_stock"), deltas, factors)
    close(ours, paper(deltas, factors), deltas, [5.0] * len(deltas))


def test_over_several_chunks() -> None:
    shared = several_chunks(4)
    deltas, factors = [shared[0] + delta for delta in shared[1:]], [1.0, 2.0, 0.5]
    ours = merged(make_method("model_stock"), deltas, factors)
    close(ours, paper(deltas, factors), deltas, factors)


def test_agrees_with_mergekit() -> None:
    stored = golden("model_stock")
    ours = merged(make_method("model_stock"), golden_deltas(stored), [1.0] * 3)
    assert relative_error(ours, stored["merged"]) < 1e-5


def test_the_angle_says_how_far_to_go() -> None:
    # cos 60° = 1/2 and two experts: t = 1 / 1.5.
    deltas = [torch.tensor([2.0, 0.0]), torch.tensor([1.0, math.sqrt(3)])]
    expected = (deltas[0] + deltas[1]) / 2 / 1.5
    torch.testing.assert_close(merged(make_method("model_stock"), deltas, [1.0, 1.0]), expected)


def test_experts_at_right_angles_or_more_leave_the_base() -> None:
    for other in ([0.0, 1.0], [-1.0, 0.1], [-1.0, 0.0]):
        deltas = [torch.tensor([1.0, 0.0]), torch.tensor(other)]
        assert merged(make_method("model_stock"), deltas, [1.0, 1.0]).tolist() == [0.0, 0.0]


def test_one_expert_stays_itself_and_zeros_pull_to_the_base() -> None:
    delta = torch.randn(20)
    assert torch.equal(merged(make_method("model_stock"), [delta], [2.0]), delta)
    assert torch.equal(merged(make_method("model_stock"), [delta, -delta], [1.0, 0.0]), delta)
    assert not merged(make_method("model_stock"), [delta, None], [1.0, 1.0]).any()


@pytest.mark.parametrize("factors", [[1.0, -1.0], [0.0, 0.0]])
def test_weights_that_cancel_give_nothing(factors: list[float]) -> None:
    deltas = [torch.ones(3), torch.full((3,), 2.0)]
    assert not merged(make_method("model_stock"), deltas, factors).any()
