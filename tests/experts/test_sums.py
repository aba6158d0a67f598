from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.experts.sums import inner_products, squared_norm

lengths = st.sampled_from([0, 1, 7, 1023, 1024, 1025, 5000, 2**18])


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    length=lengths,
    seed=st.integers(0, 99),
    kind=st.sampled_from(["normal", "positive", "heavy tails"]),
    scale=st.sampled_from([1e-12, 1.0, 1e6]),
)
def test_inner_products(rows: int, columns: int, length: int, seed: int, kind: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, length, generator=generator) for count in (rows, columns))
    if kind == "positive":
        a, b = a.abs(), b.abs()
    elif kind == "heavy tails":
        a, b = a.tan(), b.tan()
    a = a * scale
    exact = a.double() @ b.double().T
    size = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)[None, :]
    ours = inner_products(a, b)
    assert ours.dtype == torch.float64
    assert bool(((ours - exact).abs() <= 1e-6 * size).all())
    for row in a:
        exact_square = float(row.double() @ row.double())
        assert abs(squared_norm(row) - exact_square) <= 1e-6 * exact_square


def test_long_sums_lose_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(2**18, generator=generator).tan()
    positive = torch.rand(2, 2**18, generator=generator)
    assert squared_norm(heavy) == pytest.approx(float(heavy.double().square().sum()), rel=1e-6)
    exact = positive.double() @ positive.double().T
    torch.testing.assert_close(inner_products(positive, positive), exact, rtol=1e-7, atol=0)


def test_values_that_are_not_finite_show() -> None:
    values = torch.ones(3000)
    values[5] = float("nan")
    assert not squared_norm(values) < float("inf")
    values[5] = 1e30
    assert squared_norm(values) == float("inf")
