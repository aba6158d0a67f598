from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.merging import make_method
from mergeready.metrics.over_accumulation import projections, times_over
from tests.merging.matrices import error, matrices, merged, shapes


@given(shape=shapes, seed=st.integers(0, 99), count=st.integers(1, 5))
def test_equals_the_definition(shape: tuple[int, int], seed: int, count: int) -> None:
    deltas = matrices(shape, count, seed)
    goal = sum(d.double().numpy() for d in deltas) * 0.7
    U, S, _ = np.linalg.svd(goal, full_matrices=False)
    values, times = projections(torch.from_numpy(goal), deltas)
    np.testing.assert_allclose(values.numpy(), S[: len(values)], rtol=1e-9, atol=1e-12)
    expected = np.zeros((count, len(values)))
    weighted = []
    for r in range(len(values)):
        own = [U[:, r] @ d.double().numpy() for d in deltas]
        expected[:, r] = [(U[:, r] @ goal) @ a / (a @ a) for a in own]
        weighted.append(sum((U[:, r] @ goal) @ a for a in own) / sum(a @ a for a in own))
    np.testing.assert_allclose(times.numpy(), expected, rtol=1e-5, atol=1e-7)
    energy = values.numpy() ** 2
    total = float((energy * weighted).sum() / energy.sum())
    assert times_over(torch.from_numpy(goal), deltas) == pytest.approx(total, rel=1e-6)


def test_svc_takes_back_what_it_counts() -> None:
    """The method's own result, whose goldens are its authors', from nothing but the counts."""
    deltas = matrices((12, 20), 4)
    total = sum(d.double() for d in deltas)
    _, times = projections(total, deltas)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    calibrated = (left * (values * 4 / times.clamp(min=0.25).sum(0))) @ right
    assert error(merged(make_method("svc"), deltas, [1.0] * 4), calibrated.numpy()) < 1e-5


@settings(max_examples=25)
@given(seed=st.integers(0, 99), count=st.integers(1, 6), scale=st.sampled_from([0.3, 1.0, 2.0]))
def test_closed_forms(seed: int, count: int, scale: float) -> None:
    (a,) = matrices((12, 20), 1, seed)
    assert times_over(scale * a, [a] * count) == pytest.approx(scale, rel=1e-6)
    apart = torch.zeros(count, 6 * count, 5 * count)
    for i in range(count):  # disjoint outputs and inputs: every direction belongs to one expert
        apart[i, 6 * i : 6 * (i + 1), 5 * i : 5 * (i + 1)] = matrices((6, 5), 1, seed + i)[0]
    assert times_over(scale * apart.sum(0), list(apart)) == pytest.approx(scale, rel=1e-5)


def test_an_expert_that_does_nothing_in_a_direction_counts_zero_there() -> None:
    a, b = torch.zeros(2, 4, 4)
    a[0, 0], b[1, 1] = 2.0, 1.0
    _, times = projections(a + b, [a, b])
    assert times.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    noisy = b + 1e-8 * torch.randn(4, 4)
    _, times = projections(a + b, [a, noisy])
    assert abs(float(times[1, 0])) == 0


def test_where_nothing_is_changed() -> None:
    assert math.isnan(times_over(torch.zeros(3, 4), [torch.ones(3, 4)]))
    assert math.isnan(times_over(torch.ones(3, 4), [torch.zeros(3, 4)]))
    for function in (projections, times_over):
        with pytest.raises(OptionError, match="at least one expert"):
            function(torch.eye(2), [])
