from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo, chunk_ranges, is_mergeable
from mergeready.weights.state_dict import StateDictSource

shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)


@given(shape=shapes, limit=st.integers(1, 500))
def test_chunks_cover_a_tensor_exactly(shape: tuple[int, ...], limit: int) -> None:
    info = TensorInfo(shape, torch.float32)
    ranges = list(chunk_ranges(info, limit))
    covered = [element for start, stop in ranges for element in range(start, stop)]
    assert covered == list(range(math.prod(shape)))
    assert all(0 < stop - start <= limit for start, stop in ranges)


@given(rows=st.integers(1, 60), width=st.integers(1, 60), limit=st.integers(1, 500))
def test_chunks_keep_rows_whole_where_rows_fit(rows: int, width: int, limit: int) -> None:
    ranges = list(chunk_ranges(TensorInfo((rows, width), torch.float32), limit))
    if width <= limit:
        assert all(start % width == stop % width == 0 for start, stop in ranges)
        assert len(ranges) == math.ceil(rows / (limit // width))
    else:
        assert len(ranges) == math.ceil(rows * width / limit)


def test_chunks_are_a_mebibyte_of_fp32_unless_told() -> None:
    ranges = list(chunk_ranges(TensorInfo((CHUNK_ELEMENTS + 1,), torch.float32)))
    assert ranges == [(0, CHUNK_ELEMENTS), (CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1)]
    assert CHUNK_ELEMENTS * 4 == 2**20


@given(shape=shapes, dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int8, torch.bool]))
def test_sizes_are_those_of_a_real_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, info = torch.empty(shape, dtype=dtype), TensorInfo(shape, dtype)
    assert (info.numel, info.nbytes) == (tensor.numel(), tensor.nbytes)
    assert info.rows == (tensor.shape[0] if tensor.ndim else 1)


@given(shape=shapes.filter(bool), data=st.data())
def test_rows_and_slices_are_those_of_the_tensor(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    source = StateDictSource({"x": tensor})
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    assert torch.equal(source.read_rows("x", start, stop), tensor[start:stop])
    assert torch.equal(source.read("x"), tensor)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("layer.weight", torch.float32, True),
        ("layer.weight", torch.bfloat16, True),
        ("layer.weight", torch.float64, True),
        ("layer.weight", torch.int8, False),
        ("mask", torch.bool, False),
        ("bn.running_mean", torch.float32, False),
        ("bn.running_var", torch.float32, False),
        ("bn.num_batches_tracked", torch.int64, False),
        ("running_mean_head.weight", torch.float32, True),
    ],
)
def test_what_is_a_weight(name: str, dtype: torch.dtype, expected: bool) -> None:
    assert is_mergeable(name, TensorInfo((2,), dtype)) is expected
