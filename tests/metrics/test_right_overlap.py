from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics.right_overlap import chance_overlap, right_overlap
from tests.merging.matrices import adapters, matrices, shapes


@given(shape=shapes, seed=st.integers(0, 99), rank=st.integers(1, 9))
def test_is_the_mean_squared_cosine_of_the_principal_angles(
    shape: tuple[int, int], seed: int, rank: int
) -> None:
    a, b = (delta.double().numpy() for delta in matrices(shape, 2, seed))
    k = min(rank, *shape)
    # Right singular vectors as eigenvectors, which leaves the SVD out.
    Va, Vb = (np.linalg.eigh(m.T @ m)[1][:, ::-1][:, :k] for m in (a, b))
    cosines = np.linalg.svd(Va.T @ Vb, compute_uv=False)
    found = right_overlap(torch.from_numpy(a), torch.from_numpy(b), rank)
    assert found == pytest.approx(float(np.mean(cosines**2)), rel=1e-5, abs=1e-7)


@given(seed=st.integers(0, 99))
def test_is_symmetric_and_blind_to_what_is_written(seed: int) -> None:
    a, b = (delta.double() for delta in matrices((12, 20), 2, seed))
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    value = right_overlap(a, b, 3)
    assert right_overlap(b, a, 3) == pytest.approx(value, rel=1e-9)
    assert right_overlap(Q @ a, -2 * b, 3) == pytest.approx(value, rel=1e-9)
    assert right_overlap(a, Q @ a, 3) == pytest.approx(1.0)


def test_strangers_overlap_by_chance() -> None:
    pairs = [torch.randn(2, 30, 50, dtype=torch.float64) for _ in range(60)]
    mean = sum(right_overlap(a, b, 5) for a, b in pairs) / len(pairs)
    assert mean == pytest.approx(chance_overlap(50, 5), rel=0.1)


def test_an_expert_of_lower_rank_is_compared_by_its_rank() -> None:
    one = torch.zeros(4, 6)
    one[0, 0] = 1
    assert right_overlap(one, torch.eye(4, 6), rank=4) in (0.0, 1.0)  # equal values: any of them may lead
    (low,) = adapters((12, 20), [2])
    assert right_overlap(low.B @ low.A, low.B @ low.A, rank=8) == pytest.approx(1.0)


def test_nothing_changed_is_not_a_number() -> None:
    assert math.isnan(right_overlap(torch.zeros(3, 4), torch.ones(3, 4)))


def test_the_rank_is_checked() -> None:
    with pytest.raises(OptionError, match="`rank` must be at least 1, not 0"):
        right_overlap(torch.eye(2), torch.eye(2), 0)
