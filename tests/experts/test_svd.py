"""Singular triples and polar factors against what defines them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts import dense
from mergeready.experts.svd import leading_svd, polar, thin_svd
from tests.merging.matrices import adapters, shapes

reference = torch.linalg.svd


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def matrix(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    count = len(values)
    return orthonormal(rows, count, seed) * values @ orthonormal(columns, count, seed + 1).T


def decomposes(matrix: Tensor, rank: int) -> None:
    left, values, right = thin_svd(matrix)
    assert len(values) == rank
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[:rank])
    torch.testing.assert_close((left * values) @ right, matrix)
    for basis in (left.T, right):
        torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)


@given(shape=shapes, seed=st.integers(0, 99))
def test_thin_svd(shape: tuple[int, int], seed: int) -> None:
    decomposes(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), min(shape)
    )


def test_thin_svd_leaves_out_what_is_zero() -> None:
    for shape in ((30, 20), (20, 30), (20, 20)):
        (low,) = adapters(shape, [4])
        decomposes(low.B.double() @ low.A.double(), 4)
        # The same product rounded to fp32 has full rank, all but four of its directions are noise.
        assert len(thin_svd(dense(low).double())[1]) == 4
        assert len(thin_svd(torch.zeros(shape, dtype=torch.float64))[1]) == 0


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-4, 3e-5, 1e-5, 2e-6])
def test_small_singular_values_are_as_exact_as_needed(smallest: float) -> None:
    """Whether by squares, which lose half of the digits, or not: on both sides of where that changes."""
    values = torch.logspace(0, math.log10(smallest), 24, dtype=torch.float64)
    for shape in ((40, 24), (24, 40), (24, 24)):
        left, found, _ = thin_svd(matrix(values, *shape))
        torch.testing.assert_close(found, values, rtol=1e-6, atol=0)
        assert (left.T @ left - torch.eye(24)).abs().max() < 1e-6
        few = thin_svd(matrix(values, *shape), 5)
        torch.testing.assert_close(few[1], values[:5], rtol=1e-12, atol=0)
        overlaps = (few[0].T @ left[:, :5]).abs()
        torch.testing.assert_close(overlaps, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_it_costs_less_where_squares_are_exact_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other decompositions are not even asked then; where squares lose too much, they are."""
    values = torch.logspace(0, -4, 24, dtype=torch.float64)
    given, asked = matrix(values, 40, 24), []
    monkeypatch.setattr(
        torch.linalg, "svd", lambda *args, **options: asked.append(args) or reference(*args, **options)
    )
    thin_svd(given)
    assert not asked
    thin_svd(matrix(values**1.25, 40, 24))
    assert asked


def test_polar_factor() -> None:
    matrix = torch.randn(9, 5, dtype=torch.float64)
    factor = polar(matrix)
    torch.testing.assert_close(factor.T @ factor, torch.eye(5, dtype=torch.float64))
    stretch = factor.T @ matrix  # symmetric and positive: that makes it the nearest
    torch.testing.assert_close(stretch, stretch.T)
    assert torch.linalg.eigvalsh(stretch).min() > 0


@pytest.mark.parametrize("shape", [(700, 600), (600, 700), (40, 30)])
def test_leading_triples_of_a_known_spectrum(shape: tuple[int, int]) -> None:
    values = 0.97 ** torch.arange(min(shape), dtype=torch.float64)
    given = matrix(values, *shape)
    left, found, right = leading_svd(given, 20)
    assert torch.allclose(found, values[:20], rtol=1e-4)
    assert torch.allclose(
        (left.T @ orthonormal(shape[0], min(shape), 0)[:, :20]).abs().diag(),
        torch.ones(20).double(),
        atol=1e-2,
    )
    assert torch.allclose((left * found) @ right, given @ right.T @ right, atol=1e-3)


def test_it_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    leading_svd(matrix(torch.ones(520).double(), 520, 520), 3)
    assert torch.equal(torch.get_rng_state(), before)
