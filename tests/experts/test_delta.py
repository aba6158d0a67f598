from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts import Delta, Dense, LowRank, Rows, dense

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-12, 1e-4, 1.0, 1e6])
ranks = st.integers(1, 12)


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape: tuple[int, ...], rank: int, seed: int, scale: float) -> tuple[Delta, Tensor]:
    B, A = random((shape[0], rank), seed), random((rank, math.prod(shape[1:])), seed + 1, scale)
    return LowRank(B, A, shape), (B.double() @ A.double()).reshape(shape)


def rows(shape: tuple[int, ...], count: int, seed: int, scale: float) -> tuple[Delta, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(shape[0], generator=generator)[:count]
    value = random((len(index), *shape[1:]), seed, scale)
    return Rows(index, value, shape), torch.zeros(shape).double().index_add(0, index, value.double())


def check(delta: Delta, expected: Tensor, data: st.DataObject) -> None:
    """A delta against its float64 value: whole, in slices, its norm."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    assert delta.shape == tuple(expected.shape)
    whole = dense(delta)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-6 * size)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    piece = delta.flat(start, stop)
    assert piece.dtype == torch.float32
    torch.testing.assert_close(piece.double(), expected.reshape(-1)[start:stop], rtol=1e-5, atol=1e-6 * size)
    assert delta.norm() == pytest.approx(float(expected.norm()), rel=1e-6, abs=1e-300)


@given(shape=shapes | st.just(()), seed=seeds, scale=scales, data=st.data())
def test_dense(shape: tuple[int, ...], seed: int, scale: float, data: st.DataObject) -> None:
    value = random(shape, seed, scale)
    check(Dense(value), value.double(), data)


@given(shape=shapes, seed=seeds, data=st.data())
def test_dense_of_other_dtypes_is_read_as_fp32(
    shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    value = random(shape, seed).bfloat16()
    check(Dense(value), value.double(), data)


@given(shape=shapes, rank=ranks, seed=seeds, scale=scales, data=st.data())
def test_low_rank(shape: tuple[int, ...], rank: int, seed: int, scale: float, data: st.DataObject) -> None:
    check(*low_rank(shape, rank, seed, scale), data)


@given(shape=shapes, count=st.integers(0, 9), seed=seeds, scale=scales, data=st.data())
def test_rows(shape: tuple[int, ...], count: int, seed: int, scale: float, data: st.DataObject) -> None:
    check(*rows(shape, count, seed, scale), data)


@given(shape=shapes, rank=ranks, seed=seeds)
def test_rank_of_random_deltas_is_the_largest_that_the_form_allows(
    shape: tuple[int, ...], rank: int, seed: int
) -> None:
    for delta, expected in (
        (Dense(random(shape, seed)), random(shape, seed)),
        low_rank(shape, rank, seed, 1.0),
        rows(shape, rank, seed, 1.0),
    ):
        matrix = expected.double().reshape(shape[0], -1) if len(shape) > 1 else expected.double()[None]
        assert delta.rank() == int(torch.linalg.matrix_rank(matrix))


def test_norm_of_a_low_rank_delta_that_cancels_is_zero_and_not_nan() -> None:
    B, A = random((6, 2), 0), random((2, 5), 1)
    cancelled = LowRank(torch.cat([B, -B], 1), torch.cat([A, A]), (6, 5))
    assert 0 <= cancelled.norm() < 1e-6 * LowRank(B, A, (6, 5)).norm()


def test_factors_may_be_half_precision_but_the_product_is_not() -> None:
    B, A = random((40, 8), 0).bfloat16(), random((8, 40), 1).bfloat16()
    exact = B.double() @ A.double()
    torch.testing.assert_close(dense(LowRank(B, A, (40, 40))).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("B", "A", "shape"),
    [
        ((3, 2), (3, 4), (3, 4)),
        ((3, 2), (2, 4), (4, 4)),
        ((3, 2), (2, 4), (3, 5)),
        ((3, 2), (2, 4), (3, 2, 3)),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    B: tuple[int, int], A: tuple[int, int], shape: tuple[int, ...]
) -> None:
    with pytest.raises(OptionError, match="do not make a change of shape"):
        LowRank(torch.zeros(B), torch.zeros(A), shape)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ([0, 0], (2, 3), "changed twice"),
        ([0, 4], (2, 3), "beyond the 4 rows"),
        ([-1], (1, 3), "beyond the 4 rows"),
        ([0, 1], (1, 3), "are not 2 rows"),
        ([0], (1, 2), "are not 1 rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(index: list[int], value: tuple[int, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Rows(torch.tensor(index), torch.zeros(value), (4, 3))


def test_single_elements_of_a_product() -> None:
    delta = LowRank(torch.randn(5, 2), torch.randn(2, 12), (5, 3, 4))
    places = torch.tensor([59, 0, 17, 17])
    torch.testing.assert_close(delta.pick(places), dense(delta).reshape(-1)[places])
