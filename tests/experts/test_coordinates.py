from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.experts.coordinates import LEAST, coordinates, projection, sample_count

names = st.text(max_size=20)
sizes = st.integers(1, 3000)


@given(names, sizes, st.integers(1, 6000), st.integers(1, 6000))
def test_a_smaller_sample_begins_a_larger_one(name: str, numel: int, small: int, large: int) -> None:
    small, large = sorted((small, large))
    few, many = coordinates(name, numel, small), coordinates(name, numel, large)
    if large < numel:
        assert torch.equal(few, many[: len(few)])
    else:
        assert torch.equal(many, torch.arange(numel))
    assert 0 <= int(few.min()) <= int(few.max()) < numel


def test_another_name_gives_other_coordinates() -> None:
    assert not torch.equal(coordinates("a", 10**6, 100), coordinates("b", 10**6, 100))


def test_coordinates_are_what_they_were_when_files_were_written() -> None:
    assert coordinates("layer.weight", 10**6, 4).tolist() == [818215, 703263, 58096, 770813]


def test_coordinates_are_spread_evenly() -> None:
    counts = torch.bincount(coordinates("weight", 10**7, 100_000) // 10**6, minlength=10).double()
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 27.9  # 9 degrees of freedom, 1 in 1000


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30), st.integers(1, 10**5))
def test_shares_of_the_budget(sizes: list[int], budget: int) -> None:
    total = sum(sizes)
    counts = [sample_count(numel, total, budget) for numel in sizes]
    for numel, count in zip(sizes, counts, strict=True):
        assert min(numel, LEAST) <= count <= numel
        assert count >= min(numel, math.floor(budget * numel / total))
    assert sum(counts) <= budget + (LEAST + 1) * len(sizes)


@pytest.mark.parametrize("width", [16, 32, 50])
def test_projections_keep_inner_products(width: int) -> None:
    x, y = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1)) / math.sqrt(4000)
    y = 0.8 * x + 0.6 * y
    estimates = [
        float((x @ projection(f"p{i}", 4000, width)) @ (y @ projection(f"p{i}", 4000, width)))
        for i in range(200)
    ]
    spread = torch.tensor(estimates)
    exact = float(x @ y)
    assert abs(float(spread.mean()) - exact) < 4 * float(spread.std()) / math.sqrt(200)
    assert float(spread.std()) < 1.6 / math.sqrt(width)
