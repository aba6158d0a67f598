from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics.subspace_alignment import alignment_ratio, leading_directions
from tests.merging.matrices import matrices, shapes


def exact(delta: np.ndarray, merged: np.ndarray, kept: float) -> float:
    """From the definition: project with the fewest directions that leave a small enough rest."""
    U, S, Vt = np.linalg.svd(merged)
    for k in range(1, len(S) + 1):
        held = (U[:, :k] * S[:k]) @ Vt[:k]
        if np.linalg.norm(held) >= kept * np.linalg.norm(merged) * (1 - 1e-12):
            break
    return float(np.linalg.norm(U[:, :k].T @ delta) / np.linalg.norm(delta))


@given(
    shape=shapes,
    seed=st.integers(0, 99),
    count=st.integers(2, 5),
    kept=st.sampled_from([0.5, 0.9, 0.95, 1.0]),
)
def test_equals_the_definition(shape: tuple[int, int], seed: int, count: int, kept: float) -> None:
    deltas = matrices(shape, count, seed)
    total = sum(deltas[1:], deltas[0])
    for delta in deltas:
        expected = exact(delta.double().numpy(), total.double().numpy(), kept)
        assert alignment_ratio(delta, total, kept) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.3, 7.0]))
def test_depends_on_directions_only(seed: int, scale: float) -> None:
    a, b = matrices((12, 20), 2, seed)
    Q, P = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (12, 20))
    value = alignment_ratio(a, a + b)
    assert 0 <= value <= 1
    assert alignment_ratio(a, scale * (a + b)) == pytest.approx(value, rel=1e-6)
    assert alignment_ratio(scale * a, a + b) == pytest.approx(value, rel=1e-6)
    turned = Q @ a.double() @ P, Q @ (a + b).double() @ P
    assert alignment_ratio(*turned) == pytest.approx(value, rel=1e-6)


def test_a_stranger_has_the_share_that_chance_gives() -> None:
    """A random matrix has √(k / rows) of its norm in any k directions."""
    merged = torch.randn(200, 10, dtype=torch.float64) @ torch.randn(10, 300, dtype=torch.float64)
    k = leading_directions(merged).shape[1]
    stranger = torch.randn(200, 300, dtype=torch.float64)
    assert alignment_ratio(stranger, merged) == pytest.approx(math.sqrt(k / 200), rel=0.1)


def test_all_directions_hold_all_that_the_merge_is_made_of() -> None:
    a, b = matrices((12, 20), 2)
    assert alignment_ratio(a, a + b, kept=1.0) == pytest.approx(1.0)


def test_nothing_changed_is_not_a_number_and_an_empty_merge_holds_nothing() -> None:
    (a,) = matrices((12, 20), 1)
    assert math.isnan(alignment_ratio(torch.zeros(12, 20), a))
    assert alignment_ratio(a, torch.zeros(12, 20)) == 0


@pytest.mark.parametrize("kept", [0, -1, 1.1, math.nan])
def test_the_share_is_checked(kept: float) -> None:
    with pytest.raises(OptionError, match=r"`kept` must be in \(0, 1\]"):
        leading_directions(torch.eye(2), kept)
