from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import make_method
from mergeready.merging.random_mask import kept_share, random_mask
from tests.merging.formulas import NAME, close, elected, grids, merged, several_chunks, sum_of, weights

densities = st.sampled_from([0.25, 0.5, 1.0])  # sums stay exact after division by these
METHODS = ["dare_linear", "dare_ties"]


def dropped(delta: Tensor, density: float, seed: int, slot: int) -> Tensor:
    """Yu et al., equations 1 and 2: m ~ Bernoulli(density), τ̂ = m ∘ τ / density."""
    if density == 1:
        return delta.double()
    kept = random_mask(density, seed=seed, slot=slot, name=NAME, start=0, stop=delta.numel())
    return delta.double() * kept.reshape(delta.shape) / density


def paper(method: str, deltas: list[Tensor], factors: list[float], density: float, seed: int) -> Tensor:
    kept = [dropped(delta, density, seed, slot) for slot, delta in enumerate(deltas)]
    return (sum_of if method == "dare_linear" else elected)(kept, factors)


@pytest.mark.parametrize("method", METHODS)
def test_is_the_paper_s_formula_with_the_same_masks(method: str) -> None:
    @given(deltas=grids(), density=densities, seed=st.integers(0, 99), data=st.data())
    def check(deltas: list[Tensor], density: float, seed: int, data: st.DataObject) -> None:
        factors = [data.draw(weights) for _ in deltas]
        ours = merged(make_method(method, density=density, seed=seed), deltas, factors)
        exact = paper(method, deltas, factors, density, seed)
        close(ours, exact, deltas, [10.0] * len(deltas))

    check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_over_several_chunks(method: str, density: float) -> None:
    deltas, factors = several_chunks(), [1.0, 0.5, 2.0]
    ours = merged(make_method(method, density=density, seed=3), deltas, factors)
    close(ours, paper(method, deltas, factors, density, 3), deltas, factors)


def test_the_mean_over_seeds_is_the_sum() -> None:
    delta, count = torch.ones(1000), 200
    total = sum(merged(make_method("dare_linear", density=0.5, seed=s), [delta], [1.0]) for s in range(count))
    # Each value is 0 or 2: its deviation is 1, and that of a mean over seeds 1/√200.
    assert float((total / count - 1).abs().max()) < 5.5 / count**0.5
    assert float((total / count).mean()) == pytest.approx(1.0, abs=5 / (1000 * count) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_rescaled_by_the_share_that_is_really_kept(method: str) -> None:
    density = 0.3  # not a multiple of 1/65536
    delta = torch.ones(500)
    ours = merged(make_method(method, density=density), [delta], [1.0])
    dropped_value, kept_value = sorted(set(ours.tolist()))
    assert dropped_value == 0
    assert kept_value == pytest.approx(1 / kept_share(density), rel=1e-6)
    assert kept_value != pytest.approx(1 / density, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_experts_and_seeds_have_their_own_masks(method: str) -> None:
    delta = torch.ones(1000)
    first = merged(make_method(method, density=0.5), [delta, delta], [1.0, 0.0])
    second = merged(make_method(method, density=0.5), [delta, delta], [0.0, 1.0])
    other = merged(make_method(method, density=0.5, seed=1), [delta, delta], [1.0, 0.0])
    for a, b in ((first, second), (first, other)):
        assert 350 < int(((a != 0) != (b != 0)).sum()) < 650


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_keeps_its_mask_when_another_lacks_the_parameter(method: str) -> None:
    delta = torch.ones(100)
    alone = merged(make_method(method, density=0.5), [None, delta], [1.0, 1.0])
    expected = paper(method, [torch.zeros(100), delta], [1.0, 1.0], 0.5, 0)
    assert torch.equal(alone.double(), expected)
