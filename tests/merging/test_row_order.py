"""Against numpy's stable argsort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging.row_order import row_order

# Ties, zeros of both signs, denormals, extremes, neighbours that share their upper bits, and what is not finite.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000002, 1e-45, -3e-45, 1e-38, 3.4e38, 2.0, 0.5, math.inf]


def sorted_order(values: Tensor) -> Tensor:
    return torch.from_numpy(np.argsort(np.abs(values.numpy()), axis=1, kind="stable"))


@given(
    numbers=st.lists(st.sampled_from(SPECIAL) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=96),
    columns=st.integers(1, 96),
)
def test_equals_a_stable_sort(numbers: list[float], columns: int) -> None:
    rows = -(-len(numbers) // columns)
    values = torch.tensor((numbers * columns)[: rows * columns]).reshape(rows, columns)
    assert torch.equal(row_order(values), sorted_order(values))


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 2), (40, 896), (9, 1025), (7, 1281), (5, 2048), (3, 5000), (1, 300_000)]
)
@pytest.mark.parametrize(
    "kind", ["normal", "rounded", "bf16", "wide", "narrow", "tiny", "sparse", "constant", "few fine"]
)
def test_equals_a_stable_sort_at_real_sizes(shape: tuple[int, int], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator)
    if kind == "rounded":
        values = (values * 5).round()
    elif kind == "bf16":
        moved = (values + 0.01 * torch.randn(shape, generator=generator)).bfloat16()
        values = moved.float() - values.bfloat16().float()
    elif kind == "wide":
        values = values * torch.exp(8 * torch.randn(shape, generator=generator))
    elif kind == "narrow":
        values = 1 + 1e-6 * values
    elif kind == "tiny":
        values = values * 1e-41
    elif kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "few fine":  # some that only their last bits tell apart, among many that have none
        values = (values * 20).round()
        fine = torch.rand(shape, generator=generator) < 0.02
        values[fine] *= 1 + 2.0**-22 * torch.randint(1, 4, shape, generator=generator)[fine]
    elif kind == "constant":
        values = torch.full(shape, -0.3)
    assert torch.equal(row_order(values), sorted_order(values))


def test_no_rows_or_no_columns() -> None:
    assert row_order(torch.empty(0, 3)).shape == (0, 3)
    assert row_order(torch.empty(3, 0)).shape == (3, 0)


def test_nan_comes_last() -> None:
    values = torch.tensor([[math.nan, 1.0, -math.inf, 0.5]])
    assert row_order(values).tolist() == [[3, 1, 2, 0]]


def test_values_are_not_written_to() -> None:
    values = torch.randn(4, 9).T  # not contiguous
    before = values.clone()
    assert torch.equal(row_order(values), sorted_order(before))
    assert torch.equal(values, before)
