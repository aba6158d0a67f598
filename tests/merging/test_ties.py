from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import make_method
from mergeready.merging.parameter import merged_delta
from mergeready.merging.ties import elect_and_average
from tests.merging.formulas import (
    NAME,
    close,
    elected,
    grids,
    merged,
    several_chunks,
    trimmed,
    vectors,
    weights,
)

densities = st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0])


def paper(deltas: list[Tensor], factors: list[float], density: float) -> Tensor:
    return elected([trimmed(delta, density) for delta in deltas], factors)


@given(deltas=grids(), density=densities, data=st.data())
def test_is_algorithm_one(deltas: list[Tensor], density: float, data: st.DataObject) -> None:
    factors = [data.draw(weights) for _ in deltas]
    ours = merged(make_method("ties", density=density), deltas, factors)
    close(ours, paper(deltas, factors, density), deltas, [1.0] * len(deltas))


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_over_several_chunks(density: float) -> None:
    deltas, factors = several_chunks(), [1.0, 0.5, 2.0]
    ours = merged(make_method("ties", density=density), deltas, factors)
    close(ours, paper(deltas, factors, density), deltas, factors)


def test_the_worked_example_of_three_experts() -> None:
    deltas = [
        torch.tensor([4.0, -1.0, 3.0, 0.5]),
        torch.tensor([2.0, 3.0, -1.0, 0.0]),
        torch.tensor([-9.0, 2.0, 0.0, 1.0]),
    ]
    # Half is kept: (4, ·, 3, ·), (2, 3, ·, ·), (-9, 2, ·, ·); the signs elected are -, +, +, none.
    assert merged(make_method("ties", density=0.5), deltas, [1.0] * 3).tolist() == [-9.0, 2.5, 3.0, 0.0]


def test_weights_set_proportions_only() -> None:
    deltas = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])]
    method = make_method("ties", density=1.0)
    assert merged(method, deltas, [1.0, 3.0]).tolist() == [2.5, 1.0]
    assert merged(method, deltas, [10.0, 30.0]).tolist() == [2.5, 1.0]


def test_signs_that_cancel_give_zero() -> None:
    deltas = [torch.tensor([2.0]), torch.tensor([-2.0])]
    assert merged(make_method("ties", density=1.0), deltas, [1.0, 1.0]).tolist() == [0.0]
    assert merged(make_method("ties", density=1.0), deltas, [1.0, 2.0]).tolist() == [-2.0]


def test_a_weight_of_zero_takes_an_expert_out_of_the_election() -> None:
    deltas = [torch.tensor([1.0, -1.0]), torch.tensor([-9.0, 9.0])]
    assert merged(make_method("ties", density=1.0), deltas, [1.0, 0.0]).tolist() == [1.0, -1.0]


def test_an_expert_without_the_parameter_does_not_vote() -> None:
    deltas = [torch.tensor([1.0, 2.0, 3.0, 4.0]), None]
    assert merged(make_method("ties", density=0.5), deltas, [1.0, 1.0]).tolist() == [0.0, 0.0, 3.0, 4.0]


def test_trimming_is_by_parameter() -> None:
    small = torch.tensor([1e-9, 2e-9])
    assert merged(make_method("ties", density=0.5), [small], [1.0]).tolist() == [0.0, small[1].item()]


def test_a_parameter_without_elements_is_no_problem() -> None:
    made = vectors([torch.zeros(0, 3)])
    assert merged_delta(make_method("ties"), NAME, made[0].infos[NAME], made, [1.0]) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_election_never_hides_what_is_not_finite(bad: float) -> None:
    for others in ([0.0], [1.0, 2.0], [-1.0, 3.0], [float("inf")], [-float("inf")]):
        deltas = [torch.full((20,), value) for value in (bad, *others)]
        result = elect_and_average(deltas, [1.0] * len(deltas))
        assert not bool(torch.isfinite(result).any())
