from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import make_method
from tests.merging.formulas import (
    close,
    golden,
    golden_deltas,
    grids,
    merged,
    relative_error,
    several_chunks,
    sum_of,
    weights,
)


def masked(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Davari and Belilovsky, section 3: of the entries by falling magnitude, those after the first γ share."""
    flat = delta.double().reshape(-1)
    keep = max(1, math.floor(density * len(flat) + 1e-9))
    first = min(math.floor(gamma * len(flat) + 1e-9), len(flat) - keep)
    ranked = torch.from_numpy(np.argsort(-flat.abs().numpy(), kind="stable"))[first : first + keep]
    result = torch.zeros_like(flat)
    result[ranked] = flat[ranked]
    return result.reshape(delta.shape)


@given(
    deltas=grids(),
    density=st.sampled_from([0.01, 0.15, 0.5, 1.0]),
    gamma=st.sampled_from([0.0, 0.007, 0.1, 0.6, 1.0]),
    data=st.data(),
)
def test_is_the_paper_s_formula(
    deltas: list[Tensor], density: float, gamma: float, data: st.DataObject
) -> None:
    factors = [data.draw(weights) for _ in deltas]
    ours = merged(make_method("breadcrumbs", density=density, gamma=gamma), deltas, factors)
    close(ours, sum_of([masked(d, density, gamma) for d in deltas], factors), deltas, [10.0] * len(deltas))


def test_over_several_chunks() -> None:
    deltas, factors = several_chunks(), [1.0, 0.5, 2.0]
    ours = merged(make_method("breadcrumbs"), deltas, factors)
    close(ours, sum_of([masked(d, 0.15, 0.007) for d in deltas], factors), deltas, factors)


def test_agrees_with_the_authors_code() -> None:
    stored = golden("breadcrumbs")
    ours = merged(make_method("breadcrumbs"), golden_deltas(stored), [0.5, 1.0, 2.0])
    assert relative_error(ours, stored["merged"]) < 1e-6


def test_the_middle_is_kept() -> None:
    delta = torch.tensor([1.0, -9.0, 3.0, -4.0, 0.5, 100.0, 2.0, 0.0, 5.0, -6.0])
    ours = merged(make_method("breadcrumbs", density=0.3, gamma=0.2), [delta], [1.0])
    assert ours.tolist() == [0, 0, 0, -4, 0, 0, 0, 0, 5, -6]


def test_outliers_stay_where_the_density_leaves_no_room() -> None:
    delta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert merged(make_method("breadcrumbs", density=0.75, gamma=0.9), [delta], [1.0]).tolist() == [
        1,
        2,
        3,
        0,
    ]
    assert merged(make_method("breadcrumbs", density=1.0, gamma=0.9), [delta], [1.0]).tolist() == [1, 2, 3, 4]
    assert merged(make_method("breadcrumbs", gamma=0.9), [torch.tensor([7.0])], [1.0]).tolist() == [7]


def test_the_default_drops_most() -> None:
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ours = merged(make_method("breadcrumbs"), [delta], [1.0])
    assert int((ours != 0).sum()) == 150
    assert set(delta.abs().topk(7).indices.tolist()).isdisjoint(ours.nonzero().flatten().tolist())


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), "a"])
def test_shares_outside_the_range_are_refused(gamma: object) -> None:
    with pytest.raises(OptionError, match=r"`gamma` must be in \[0, 1\]"):
        make_method("breadcrumbs", gamma=gamma)
