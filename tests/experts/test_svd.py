"""Singular triples and polar factors against what defines them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts import dense
from mergeready.experts.svd import polar, thin_svd
from tests.merging.matrices import adapters, shapes


def decomposes(matrix: Tensor, rank: int) -> None:
    left, values, right = thin_svd(matrix)
    assert len(values) == rank
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[:rank])
    torch.testing.assert_close((left * values) @ right, matrix)
    for basis in (left.T, right):
        torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64))


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


def test_polar_factor() -> None:
    matrix = torch.randn(9, 5, dtype=torch.float64)
    factor = polar(matrix)
    torch.testing.assert_close(factor.T @ factor, torch.eye(5, dtype=torch.float64))
    stretch = factor.T @ matrix  # symmetric and positive: that makes it the nearest
    torch.testing.assert_close(stretch, stretch.T)
    assert torch.linalg.eigvalsh(stretch).min() > 0
