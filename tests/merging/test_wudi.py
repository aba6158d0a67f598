from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import make_method
from tests.merging import matrices as exact
from tests.merging.matrices import error, factors, matrices, merged, shapes, weighted

RIDGES = (0.0, 1e-4, 1e-2, 1.0)


def objective(merge: Tensor, deltas: list[Tensor], ridge: float) -> Tensor:
    """What the paper minimises, as it is written there, and the distance to the start."""
    interference = sum(((merge - d) @ d.T).square().sum() / d.square().sum() for d in deltas)
    return interference + ridge * len(deltas) * (merge - sum(deltas)).square().sum()


@given(shape=shapes, seed=st.integers(0, 99), ridge=st.sampled_from(RIDGES), data=st.data())
def test_is_the_least_squares_solution(
    shape: tuple[int, int], seed: int, ridge: float, data: st.DataObject
) -> None:
    deltas = matrices(shape, 3, seed)
    weights = [data.draw(factors) for _ in deltas]
    ours = merged(make_method("wudi", ridge=ridge), deltas, weights)
    assert error(ours, exact.wudi(weighted(deltas, weights), ridge)) < 1e-5


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 90)])
def test_minimises_the_paper_s_objective(shape: tuple[int, int], ridge: float) -> None:
    deltas = [d.double() for d in matrices(shape, 3)]
    best = merged(make_method("wudi", ridge=ridge), deltas, [1.0] * 3).double().requires_grad_()
    value = objective(best, deltas, ridge)
    (slope,) = torch.autograd.grad(value, best)
    (steepness,) = torch.autograd.grad(objective(start := sum(deltas).requires_grad_(), deltas, ridge), start)
    assert float(slope.norm()) < 1e-5 * float(steepness.norm())
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        step = 0.01 * best.std() * torch.randn(shape, dtype=torch.float64, generator=generator)
        assert objective(best + step, deltas, ridge) > value


def test_gets_below_the_authors_steps_of_adam() -> None:
    """Three hundred steps from the sum, with steps as long beside these task vectors as theirs are beside theirs."""
    deltas = [d.double() for d in matrices((24, 40), 4)]
    merge = torch.nn.Parameter(sum(deltas))
    adam = torch.optim.Adam([merge], lr=0.01 * float(deltas[0].std()))
    for _ in range(300):
        adam.zero_grad()
        objective(merge, deltas, 0.0).backward()
        adam.step()
    exactly = merged(make_method("wudi", ridge=0), deltas, [1.0] * 4).double()
    assert (
        objective(exactly, deltas, 0.0) <= objective(merge, deltas, 0.0) < objective(sum(deltas), deltas, 0.0)
    )


def test_a_large_ridge_leaves_the_sum() -> None:
    deltas = matrices((12, 20), 2)
    ours = merged(make_method("wudi", ridge=1.0), deltas, [1.0, 1.0])
    assert error(ours, sum(deltas).double().numpy()) < error(
        merged(make_method("wudi", ridge=1e-3), deltas, [1.0, 1.0]), sum(deltas).double().numpy()
    )


def test_experts_of_disjoint_inputs_are_kept_whole() -> None:
    deltas = [torch.zeros(4, 6), torch.zeros(4, 6)]
    deltas[0][:, :3], deltas[1][:, 3:] = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(merged(make_method("wudi"), deltas, [1.0, 1.0]), sum(deltas))


def test_the_ridge_is_checked() -> None:
    with pytest.raises(OptionError, match=r"`ridge` must be in \[0, 1\]"):
        make_method("wudi", ridge=-1e-3)
