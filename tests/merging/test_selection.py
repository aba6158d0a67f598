"""Against a full stable sort by falling magnitude."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import selection
from mergeready.merging.selection import TopK, kept_count, top_k, top_ks
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo, chunk_ranges

# Ties, zeros of both signs, denormals, the extremes of fp32, and neighbours that share their upper 16 bits.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000002, 1e-45, -3e-45, 1e-38, 3.4e38, -3.4e38, 2.0, 0.5]
numbers = st.lists(st.sampled_from(SPECIAL) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=120)


def sorted_mask(values: Tensor, count: int) -> list[bool]:
    order = np.argsort(-np.abs(values.numpy()), kind="stable")
    mask = np.zeros(len(values), dtype=bool)
    mask[order[:count]] = True
    return mask.tolist()


def select(values: Tensor, count: int) -> TopK:
    return top_k(lambda a, b: values[a:b].clone(), TensorInfo(tuple(values.shape), values.dtype), count)


def masked(chosen: TopK, values: Tensor, cuts: list[int]) -> list[bool]:
    borders = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    pieces = [chosen.mask(values[a:b], a) for a, b in pairwise(borders)]
    return torch.cat(pieces).tolist()


def trimmed(chosen: TopK, values: Tensor, cuts: list[int]) -> Tensor:
    borders = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    return torch.cat([chosen.trim(values[a:b].clone(), a) for a, b in pairwise(borders)])


@pytest.fixture(params=["at once", "bracketed 7", "bracketed 1", "in any case 7"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to the border, at sizes that a test can enumerate; a sample of eight entries often misleads."""
    if request.param != "at once":
        limit = int(request.param.split()[-1])
        monkeypatch.setattr(selection, "can_be_held", lambda *_: False)
        monkeypatch.setattr(selection, "_BLOCK", 1)
        monkeypatch.setattr(selection, "_BLOCKS", (2, 8))
        monkeypatch.setattr(selection, "_SIGMAS", 0.5)
        monkeypatch.setattr(selection, "chunk_ranges", lambda info: chunk_ranges(info, limit))
    if request.param.startswith("in any case"):
        monkeypatch.setattr(selection, "_MOST", -1)


@pytest.mark.usefixtures("chunking")
def test_equals_a_stable_sort() -> None:
    @given(numbers=numbers, data=st.data())
    def check(numbers: list[float], data: st.DataObject) -> None:
        values = torch.tensor(numbers, dtype=torch.float32)
        count = data.draw(st.integers(1, len(values)))
        chosen = select(values, count)
        cuts = data.draw(st.lists(st.integers(0, 120), max_size=4))
        mask = masked(chosen, values, cuts)
        assert mask == sorted_mask(values, count)
        assert sum(mask) == count
        assert torch.equal(trimmed(chosen, values, cuts), values * torch.tensor(mask))

    check()


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45])
def test_among_equals_the_first_are_taken(value: float) -> None:
    values = torch.full((30,), value)
    values[3] *= -1
    for count in (1, 8, 30):
        assert masked(select(values, count), values, [4, 9]) == [i < count for i in range(30)]


@pytest.mark.usefixtures("chunking")
def test_several_counts_at_once() -> None:
    @given(numbers=numbers, data=st.data())
    def check(numbers: list[float], data: st.DataObject) -> None:
        values = torch.tensor(numbers, dtype=torch.float32)
        counts = data.draw(st.lists(st.integers(1, len(values)), max_size=3))
        info = TensorInfo(tuple(values.shape), values.dtype)
        found = top_ks(lambda a, b: values[a:b].clone(), info, counts)
        assert found == [select(values, count) for count in counts]

    check()


@pytest.mark.parametrize("kind", ["normal", "rounded", "sparse", "one bin", "rows", "rising"])
@pytest.mark.parametrize("density", [1e-5, 0.2, 0.999])
@pytest.mark.parametrize("held", [True, False])
def test_equals_a_stable_sort_over_real_chunks(
    kind: str, density: float, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "can_be_held", lambda *_: held)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * CHUNK_ELEMENTS + 777, generator=generator)
    if kind == "rounded":
        values = (values * 50).round()
    elif kind == "sparse":
        values *= torch.rand(values.shape, generator=generator) < 0.1
    elif kind == "rows":  # blocks tell little about the whole
        values[: len(values) // 7] *= 100
    elif kind == "rising":
        values = torch.arange(len(values)).float()
    elif kind == "one bin":
        values = 1 + values.abs().clamp(max=4) * 1e-3
    count = kept_count(density, len(values))
    chosen = select(values, count)
    ours = torch.cat(
        [chosen.mask(values[a:b], a) for a, b in chunk_ranges(TensorInfo((len(values),), values.dtype))]
    )
    assert ours.tolist() == sorted_mask(values, count)


@pytest.mark.usefixtures("chunking")
def test_infinity_is_the_largest() -> None:
    values = torch.tensor([1.0, math.inf, 2.0, -math.inf, 3.0])
    assert masked(select(values, 3), values, []) == [False, True, False, True, True]
    assert masked(select(values, 1), values, []) == [False, True, False, False, False]


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_nan_is_no_error_here(share: float) -> None:
    """Dropping multiplies by zero, which keeps NaN visible: engines then name the expert."""
    values = torch.arange(20.0)
    broken = int(20 * share)
    values[:broken] = math.nan
    mask = torch.tensor(masked(select(values, 4), values, []))
    assert bool((values * mask).isnan().any())
    kept = trimmed(select(values, 4), values, [5, 9])
    assert bool(kept.isnan().any())
    assert torch.equal(kept.nan_to_num(0), (values * mask).nan_to_num(0))
    assert int(mask.sum()) == max(0, 4 - broken)


@given(numel=st.integers(1, 10**6), density=st.floats(1e-6, 1))
def test_kept_count(numel: int, density: float) -> None:
    count = kept_count(density, numel)
    assert 1 <= count <= numel
    assert count == max(1, math.floor(density * numel)) or abs(density * numel - count) < 1e-6


@pytest.mark.parametrize(
    ("density", "numel", "count"), [(0.29, 100, 29), (0.57, 100, 57), (0.2, 10, 2), (1.0, 7, 7), (0.5, 1, 1)]
)
def test_rounding_errors_do_not_lose_an_entry(density: float, numel: int, count: int) -> None:
    assert kept_count(density, numel) == count
