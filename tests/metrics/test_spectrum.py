from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.metrics.inspection import stable_rank
from mergeready.metrics.spectrum import spectrum
from tests.merging.matrices import matrices, shapes


@given(shape=shapes, seed=st.integers(0, 99))
def test_equals_the_definitions(shape: tuple[int, int], seed: int) -> None:
    (matrix,) = matrices(shape, 1, seed)
    S = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = spectrum(matrix)
    assert found.norm == pytest.approx(np.linalg.norm(S))
    assert found.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2)
    p = S / S.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert found.top_energy == {k: pytest.approx((S[:k] ** 2).sum() / (S**2).sum()) for k in (1, 4, 16)}
    assert found.stable_rank == pytest.approx(stable_rank(matrix), rel=0.02)  # by power iteration


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_count_as_many_as_they_are(rank: int) -> None:
    left, right = (torch.linalg.qr(torch.randn(20, rank, dtype=torch.float64)).Q for _ in range(2))
    found = spectrum(5 * left @ right.T)
    assert (found.stable_rank, found.effective_rank) == (pytest.approx(rank), pytest.approx(rank))
    assert found.norm == pytest.approx(5 * math.sqrt(rank))


def test_nothing_has_no_rank() -> None:
    found = spectrum(torch.zeros(3, 4))
    assert found.norm == 0
    assert math.isnan(found.stable_rank)
    assert math.isnan(found.top_energy[1])
