"""Concatenation and compression against dense float64 singular value decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import LowRank
from mergeready.merging.adapters.compress import (
    check_rank,
    concatenated,
    factorized,
    rounding_error,
    truncated,
)

sides = st.integers(1, 24)
seeds = st.integers(0, 9999)


def random(rows: int, columns: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, rank, generator=generator)
    return LowRank(B, torch.randn(rank, columns, generator=generator), (rows, columns))


def exact(delta: LowRank) -> Tensor:
    return delta.B.double() @ delta.A.double()


def best(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Eckart and Young: the best approximation, and the share of energy it holds."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    energy = S.square().sum()
    share = float(S[:rank].square().sum() / energy) if energy > 0 else 1.0
    return U[:, :rank] * S[:rank] @ V[:rank], share


@given(rows=sides, columns=sides, ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=seeds)
def test_concatenation_is_the_weighted_sum(rows: int, columns: int, ranks: Sequence[int], seed: int) -> None:
    deltas = [random(rows, columns, rank, seed + i) for i, rank in enumerate(ranks)]
    factors = [0.7, -0.4, 2.0, 0.0][: len(ranks)]
    whole = concatenated(deltas, factors)
    assert whole.A.shape[0] == sum(ranks)
    total = sum(c * exact(delta) for c, delta in zip(factors, deltas, strict=True))
    torch.testing.assert_close(exact(whole), total, rtol=1e-5, atol=1e-5)


@given(rows=sides, columns=sides, rank=st.integers(1, 30), keep=st.integers(1, 30), seed=seeds)
def test_truncation_is_the_best_of_its_rank(rows: int, columns: int, rank: int, keep: int, seed: int) -> None:
    whole = random(rows, columns, rank, seed)
    found = truncated(whole, keep)
    closest, share = best(exact(whole), keep)
    assert found.delta.A.shape[0] <= min(keep, rows, columns, rank)
    assert found.share == pytest.approx(share, abs=1e-5)
    assert found.energy == pytest.approx(float(exact(whole).square().sum()), rel=1e-4)
    error = float((exact(found.delta) - exact(whole)).norm())
    assert error == pytest.approx(float((closest - exact(whole)).norm()), rel=1e-3, abs=1e-4 * whole.norm())


@given(rows=sides, columns=sides, keep=st.integers(1, 30), seed=seeds)
def test_factorization_is_the_best_of_its_rank(rows: int, columns: int, keep: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = factorized(matrix, keep, (rows, columns))
    closest, share = best(matrix.double(), keep)
    assert found.share == pytest.approx(share, abs=1e-5)
    torch.testing.assert_close(exact(found.delta), closest, rtol=1e-3, atol=1e-3)


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), share=st.floats(0.05, 0.99), seed=seeds)
def test_a_share_of_energy_gives_the_smallest_rank_that_keeps_it(
    rows: int, columns: int, share: float, seed: int
) -> None:
    whole = random(rows, columns, 8, seed)
    found = truncated(whole, share)
    rank = found.delta.A.shape[0]
    assert best(exact(whole), rank)[1] >= share - 1e-6
    assert rank == 1 or best(exact(whole), rank - 1)[1] < share + 1e-6


def test_the_figure_is_what_the_factors_hold() -> None:
    whole = concatenated([random(60, 40, 4, seed) for seed in range(4)], [1.0] * 4)
    found = truncated(whole, 4)
    held = float(exact(found.delta).square().sum() / exact(whole).square().sum())
    assert found.share == pytest.approx(held, rel=1e-5)
    assert 0.2 < found.share < 0.6  # random changes overlap little, and PEFT cuts them so without a word


def test_large_matrices_are_sketched_and_the_figure_is_still_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -2, 1100)
    left, _ = torch.linalg.qr(torch.randn(1100, 1100, generator=generator))
    matrix = left * spectrum @ torch.linalg.qr(torch.randn(1200, 1100, generator=generator))[0].T
    for form in (matrix, matrix.T):
        found = factorized(form.contiguous(), 16, tuple(form.shape))
        held = float(exact(found.delta).square().sum() / form.double().square().sum())
        ideal = float(spectrum[:16].double().square().sum() / spectrum.double().square().sum())
        assert found.share == pytest.approx(held, rel=1e-4)
        assert 0.97 * ideal < found.share <= ideal * (1 + 1e-5)


def test_both_factors_carry_half_of_the_size() -> None:
    found = truncated(random(30, 20, 6, 0), 3).delta
    grams = found.B.T @ found.B, found.A @ found.A.T
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-4, atol=1e-4)


def test_no_change_has_a_form_as_well() -> None:
    zero = LowRank(torch.zeros(5, 2), torch.zeros(2, 7), (5, 7))
    for found in (truncated(zero, 1), truncated(zero, 0.9), factorized(torch.zeros(5, 7), 3, (5, 7))):
        assert found.share == 1.0
        assert not exact(found.delta).any()


def test_rounding() -> None:
    whole = random(40, 30, 4, 0)
    narrow = LowRank(whole.B.bfloat16(), whole.A.bfloat16(), whole.shape)
    direct = float((exact(narrow) - exact(whole)).norm() / exact(whole).norm())
    assert rounding_error(whole, narrow) == pytest.approx(direct, rel=0.3)
    assert rounding_error(whole, whole) == 0.0


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, 1.5, True, "all", None])
def test_ranks_that_mean_nothing_are_refused(rank: object) -> None:
    with pytest.raises(OptionError, match="`rank` must be"):
        check_rank(rank)  # type: ignore[arg-type]
