from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics.singular_interference import relative_interference, singular_interference
from tests.merging.matrices import matrices, shapes


def exact(deltas: list[np.ndarray], rank: int) -> float:
    """The paper's formula, entry by entry."""
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    left = [u for U, _, _ in parts for u in U.T[:rank]]
    values = [s for _, S, _ in parts for s in S[:rank]]
    right = [v for _, _, Vt in parts for v in Vt[:rank]]
    n = len(values)
    total = 0.0
    for i in range(n):
        for j in range(n):
            entry = sum(
                (left[i] @ left[k] - (i == k)) * values[k] * (right[k] @ right[j] - (k == j))
                for k in range(n)
            )
            total += abs(entry)
    return total


@given(shape=shapes, seed=st.integers(0, 99), count=st.integers(2, 4))
def test_equals_the_paper_s_formula(shape: tuple[int, int], seed: int, count: int) -> None:
    deltas = matrices(shape, count, seed)
    rank = max(1, min(shape) // count)
    expected = exact([d.double().numpy() for d in deltas], rank)
    assert singular_interference(deltas) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert singular_interference(deltas, rank=1) == pytest.approx(
        exact([d.double().numpy() for d in deltas], 1), rel=1e-6, abs=1e-9
    )


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 3.0]))
def test_turns_and_factors(seed: int, scale: float) -> None:
    deltas = [d.double() for d in matrices((12, 20), 3, seed)]
    Q, P = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (12, 20))
    value = relative_interference(deltas)
    assert relative_interference([scale * Q @ d @ P for d in deltas]) == pytest.approx(value, rel=1e-6)
    assert singular_interference([scale * d for d in deltas]) == pytest.approx(
        scale * singular_interference(deltas), rel=1e-6
    )


def test_experts_that_share_one_side_only_do_not_interfere() -> None:
    """Same outputs from orthogonal inputs: the inputs keep them apart."""
    a, b = torch.zeros(2, 6, 8)
    a[:, :4], b[:, 4:] = torch.randn(2, 6, 4)
    assert singular_interference([a, b], rank=4) == pytest.approx(0, abs=1e-5)
    assert singular_interference([a.T, b.T], rank=4) == pytest.approx(0, abs=1e-5)
    assert singular_interference([a, b + 0.5 * a], rank=4) > 0.1


def test_an_expert_given_twice_interferes_with_all_it_has() -> None:
    (a,) = matrices((12, 20), 1)
    assert relative_interference([a, a], rank=12) == pytest.approx(1.0)
    assert singular_interference([a], rank=12) == pytest.approx(0.0, abs=1e-9)


def test_where_nothing_is_changed() -> None:
    zeros = [torch.zeros(3, 4)] * 2
    assert singular_interference(zeros) == 0
    assert math.isnan(relative_interference(zeros))


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match="at least one expert"):
        singular_interference([])
    with pytest.raises(OptionError, match="`rank` must be at least 1, not 0"):
        relative_interference([torch.eye(2)], rank=0)


def test_few_directions_tell_strangers_from_relatives_and_many_do_not() -> None:
    """What the docstring warns of: the sum over all pairs of directions is not bounded."""
    strangers = list(torch.randn(2, 120, 120, dtype=torch.float64))
    relatives = [strangers[0], strangers[0] + 0.1 * strangers[1]]
    assert relative_interference(strangers, rank=60) > 2
    assert relative_interference(strangers, rank=4) < 0.5 < relative_interference(relatives, rank=4)
