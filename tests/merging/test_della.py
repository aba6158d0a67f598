from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import make_method
from mergeready.merging.parameter import merged_delta
from mergeready.merging.random_mask import random_numbers
from mergeready.weights.source import CHUNK_ELEMENTS
from tests.merging.formulas import (
    NAME,
    close,
    elected,
    golden,
    golden_deltas,
    grids,
    merged,
    relative_error,
    several_chunks,
    sum_of,
    vectors,
    weights,
)

METHODS = ["della_linear", "della"]


def chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Deep et al., MagPrune: keep probabilities that rise with the rank in a row, from 1 - p_max to 1 - p_min."""
    rows = delta.reshape(len(delta), -1) if delta.ndim > 1 else delta.reshape(1, -1)
    result = torch.full(rows.shape, density, dtype=torch.float64)
    count = rows.shape[1]
    for row, chance in zip(rows, result, strict=True):
        order = np.argsort(row.abs().numpy(), kind="stable")
        for rank, column in enumerate(order.tolist()):
            if count > 1:
                chance[column] = density - epsilon + 2 * epsilon * rank / (count - 1)
    return (result * 65536).round().reshape(delta.shape) / 65536


def dropped(delta: Tensor, density: float, epsilon: float, seed: int, slot: int) -> Tensor:
    if density == 1:
        return delta.double()
    chance = chances(delta, density, epsilon)
    drawn = random_numbers(seed=seed, slot=slot, name=NAME, start=0, stop=delta.numel())
    uniform = torch.from_numpy(drawn / 65536).reshape(delta.shape)
    return torch.where(uniform < chance, delta.double() / chance, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_is_the_paper_s_formula_with_the_same_numbers(method: str) -> None:
    @given(
        deltas=grids(),
        density=st.sampled_from([0.3, 0.5, 0.7, 1.0]),
        epsilon=st.sampled_from([0.0, 0.1, 0.29]),
        seed=st.integers(0, 99),
        columns=st.sampled_from([1, 2, 7, 60]),
        data=st.data(),
    )
    def check(
        deltas: list[Tensor], density: float, epsilon: float, seed: int, columns: int, data: st.DataObject
    ) -> None:
        if len(deltas[0]) % columns == 0:
            deltas = [delta.reshape(-1, columns) for delta in deltas]
        factors = [data.draw(weights) for _ in deltas]
        kept = [dropped(delta, density, epsilon, seed, slot) for slot, delta in enumerate(deltas)]
        ours = merged(make_method(method, density=density, epsilon=epsilon, seed=seed), deltas, factors)
        if method == "della_linear":
            close(ours, sum_of(kept, factors), deltas, [20.0] * len(deltas))
            return
        # Rescaled values are no longer on a grid: where their sum nearly cancels, its sign is a matter of rounding.
        parts = torch.stack([w * k for w, k in zip(factors, kept, strict=True)])
        sure = parts.sum(0).abs() > 1e-5 * parts.abs().sum(0)
        close(ours[sure], elected(kept, factors)[sure], deltas, [20.0] * len(deltas))

    check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(300, 2000), (2, 300_000), (600_000,)])
def test_over_several_chunks_and_in_rows_longer_than_one(method: str, shape: tuple[int, ...]) -> None:
    assert math.prod(shape) > CHUNK_ELEMENTS
    deltas, factors = [delta.reshape(shape) for delta in several_chunks(2)], [1.0, 0.5]
    kept = []
    for slot, delta in enumerate(deltas):
        rows = delta.reshape(len(delta), -1) if delta.ndim > 1 else delta.reshape(1, -1)
        ranks = np.argsort(np.argsort(rows.abs().numpy(), axis=1, kind="stable"), axis=1)
        chance = np.round((0.63 + 0.14 * ranks / (rows.shape[1] - 1)) * 65536) / 65536
        drawn = random_numbers(seed=0, slot=slot, name=NAME, start=0, stop=delta.numel()) / 65536
        values = np.where(drawn.reshape(chance.shape) < chance, rows.double().numpy() / chance, 0)
        kept.append(torch.from_numpy(values).reshape(shape))
    exact = (sum_of if method == "della_linear" else elected)(kept, factors)
    ours = merged(make_method(method), deltas, factors)
    wrong = (ours.double() - exact).abs() > 1e-6 + 1e-5 * exact.abs()
    assert int(wrong.sum()) <= (0 if method == "della_linear" else 3)  # signs of sums that nearly cancel


def test_agrees_with_the_authors_code() -> None:
    """Up to the grid of 1/65536 on which probabilities lie here."""
    stored = golden("della")
    deltas, factors = golden_deltas(stored), [1.0, 0.5, 2.0]
    for slot, delta in enumerate(deltas):
        ours = random_numbers(seed=0, slot=slot, name=NAME, start=0, stop=delta.numel())
        assert ours.tolist() == stored[f"numbers.{slot}"].reshape(-1).tolist()  # masks stay the same for ever
    assert relative_error(merged(make_method("della_linear"), deltas, factors), stored["linear"]) < 1e-5
    assert relative_error(merged(make_method("della"), deltas, factors), stored["elected"]) < 1e-5


def test_the_mean_over_seeds_is_the_sum_and_large_entries_are_kept_more_often() -> None:
    count = 300
    delta = torch.arange(1.0, 201.0).reshape(1, -1)
    made = torch.stack(
        [
            merged(make_method("della_linear", density=0.5, epsilon=0.4, seed=s), [delta], [1.0])
            for s in range(count)
        ]
    )
    chance = chances(delta, 0.5, 0.4)
    deviation = delta * ((1 - chance) / chance / count).sqrt()
    assert bool(((made.mean(0) - delta).abs() < 5.5 * deviation).all())
    kept = (made != 0).double().mean(0)
    assert bool(((kept - chance).abs() < 5.5 * (chance * (1 - chance) / count).sqrt()).all())
    assert float(kept[:, :20].mean()) < 0.2 < 0.8 < float(kept[:, -20:].mean())


def test_ranks_are_within_rows() -> None:
    """A row of small entries loses no more than a row of large ones."""
    delta = torch.stack([torch.full((4000,), 1e-6), torch.full((4000,), 1.0)])
    kept = merged(make_method("della_linear", density=0.5, epsilon=0.4), [delta], [1.0]) != 0
    assert abs(float(kept[0].double().mean() - kept[1].double().mean())) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_density_one_drops_nothing(method: str) -> None:
    delta = torch.randn(5, 7)
    assert torch.equal(merged(make_method(method, density=1.0), [delta], [1.0]), delta)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("density", "epsilon"), [(0.05, 0.07), (0.07, 0.07), (0.95, 0.07), (0.5, 0.6)])
def test_probabilities_beyond_zero_or_one_are_refused(method: str, density: float, epsilon: float) -> None:
    with pytest.raises(OptionError, match=r"`density` ± `epsilon` must stay in \(0, 1\]"):
        make_method(method, density=density, epsilon=epsilon)
    with pytest.raises(OptionError, match="`epsilon` must be in"):
        make_method(method, epsilon=-0.1)


def test_experts_have_their_own_masks_also_when_another_lacks_the_parameter() -> None:
    delta = torch.randn(30, 40)
    second = merged(make_method("della_linear"), [torch.zeros(30, 40), delta], [1.0, 1.0])
    assert torch.equal(merged(make_method("della_linear"), [None, delta], [1.0, 1.0]), second)
    assert not torch.equal(merged(make_method("della_linear"), [delta, None], [1.0, 1.0]), second)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_what_is_remembered_of_peers_changes_nothing(name: str) -> None:
    deltas, method = several_chunks(3), make_method(name)
    expected = merged(method, deltas, [1.0, 0.5, 2.0])
    made = vectors(deltas)
    info = made[0].infos[NAME]
    for vector in made[1:]:
        vector.memory = {}
    for _ in range(2):
        found = merged_delta(method, NAME, info, made, [1.0, 0.5, 2.0])
        assert found is not None
        assert torch.equal(found, expected)
    rows = next(value for value in made[1].memory.values() if hasattr(value, "known"))
    assert sum(kept.nbytes for kept in rows.known.values()) == 2 * info.numel
    changed = merged_delta(method, NAME, info, [vectors([-2 * deltas[0]])[0], *made[1:]], [1.0, 0.5, 2.0])
    assert changed is not None
    assert torch.equal(changed, merged(method, [-2 * deltas[0], *deltas[1:]], [1.0, 0.5, 2.0]))


def test_memory_of_masks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = several_chunks(2)
    made = vectors(deltas)
    info = made[0].infos[NAME]
    made[1].memory = {}
    monkeypatch.setattr("mergeready.merging.della._MOST_REMEMBERED", info.numel - 1)
    found = merged_delta(make_method("della"), NAME, info, made, [1.0, 1.0])
    assert found is not None
    assert torch.equal(found, merged(make_method("della"), deltas, [1.0, 1.0]))
    rows = next(value for value in made[1].memory.values() if hasattr(value, "known"))
    assert rows.known is None


def test_a_probability_that_rounds_to_one_is_not_remembered_as_none() -> None:
    deltas, method = several_chunks(2), make_method("della_linear", density=0.5, epsilon=0.4999999)
    expected, made = merged(method, deltas, [1.0, 1.0]), vectors(deltas)
    made[1].memory = {}
    for _ in range(2):
        found = merged_delta(method, NAME, made[0].infos[NAME], made, [1.0, 1.0])
        assert found is not None
        assert torch.equal(found, expected)
