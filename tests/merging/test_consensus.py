from __future__ import annotations

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
    weights,
)


def paper(deltas: list[Tensor], factors: list[float], selectivity: float, least: int) -> Tensor:
    """Wang et al.: TALL masks |τₜ| > λ |τ_MTL - τₜ|, then τ_MTL where at least k of them are set."""
    parts = torch.stack([w * d.double() for d, w in zip(deltas, factors, strict=True)])
    total = parts.sum(0)
    users = (parts.abs() > selectivity * (total - parts).abs()).sum(0)
    return total * (users >= min(least, sum(w != 0 for w in factors)))


@given(
    deltas=grids(),
    selectivity=st.sampled_from([0.25, 0.5, 1.0, 2.0]),  # products stay exact, and with them comparisons
    least=st.integers(1, 4),
    data=st.data(),
)
def test_is_the_paper_s_formula(
    deltas: list[Tensor], selectivity: float, least: int, data: st.DataObject
) -> None:
    factors = [data.draw(weights) for _ in deltas]
    ours = merged(make_method("consensus", selectivity=selectivity, min_experts=least), deltas, factors)
    close(ours, paper(deltas, factors, selectivity, least), deltas, [10.0] * len(deltas))


def test_over_several_chunks() -> None:
    deltas, factors = several_chunks(), [1.0, 0.5, 2.0]
    ours = merged(make_method("consensus", selectivity=0.5), deltas, factors)
    close(ours, paper(deltas, factors, 0.5, 2), deltas, factors)


def test_agrees_with_the_authors_code() -> None:
    stored = golden("consensus")
    ours = merged(make_method("consensus"), golden_deltas(stored), [1.0] * 4)
    assert relative_error(ours, stored["merged"]) < 1e-6


def test_what_one_expert_alone_uses_goes_and_what_two_use_stays() -> None:
    deltas = [torch.tensor([5.0, 2.0, 1.0]), torch.tensor([0.1, 2.0, -1.0]), torch.tensor([0.1, 0.0, 0.5])]
    assert merged(make_method("consensus"), deltas, [1.0] * 3).tolist() == [0.0, 4.0, 0.5]
    assert merged(make_method("consensus", min_experts=1), deltas, [1.0] * 3)[0] == pytest.approx(5.2)
    assert merged(make_method("consensus", min_experts=3), deltas, [1.0] * 3).tolist() == [0.0, 0.0, 0.5]


def test_as_many_must_agree_as_there_are_at_most() -> None:
    delta = torch.tensor([1.0, -2.0])
    assert torch.equal(merged(make_method("consensus"), [delta], [1.0]), delta)
    assert torch.equal(merged(make_method("consensus"), [delta, torch.ones(2)], [1.0, 0.0]), delta)
    assert merged(make_method("consensus"), [delta, None], [1.0, 1.0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [{"selectivity": 0}, {"selectivity": float("nan")}, {"selectivity": float("inf")}, {"selectivity": "a"}],
)
def test_selectivity_must_be_positive(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="`selectivity` must be positive and finite"):
        make_method("consensus", **wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_a_number_of_experts_is_a_whole_one(wrong: object) -> None:
    with pytest.raises(OptionError, match="`min_experts` must be a whole number"):
        make_method("consensus", min_experts=wrong)
