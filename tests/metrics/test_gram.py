from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.metrics import GramAccumulator
from tests.metrics.chunks import Values, cuts, experts, feed, flat, in_parts, long_experts, values


def exact_cosines(found: list[Values]) -> Tensor:
    rows = flat(found)
    norms = rows.norm(dim=1)
    return (rows @ rows.T) / (norms[:, None] * norms[None, :])


def same(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6, equal_nan=True)


@given(found=experts())
def test_cosines(found: list[Values]) -> None:
    same(feed(GramAccumulator(len(found)), found).cosines(), exact_cosines(found))


def test_cosines_over_several_chunks() -> None:
    found = long_experts()
    # Sums of positive numbers only, where a long fp32 sum is at its worst.
    found += [
        {"long": found[0]["long"].abs()},
        {"long": values(found[0]["long"].shape, "normal", 1.0, 9).abs()},
    ]
    cosines = feed(GramAccumulator(len(found)), found).cosines()
    same(cosines, exact_cosines(found))
    assert cosines[3, 4] > 0.5


@given(seed=st.integers(0, 999), angle=st.floats(0, 3.14159), scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_a_known_angle(seed: int, angle: float, scale: float) -> None:
    a, b = values((300,), "normal", 1.0, seed).double(), values((300,), "normal", 1.0, seed + 1).double()
    a /= a.norm()
    b -= (a @ b) * a
    b /= b.norm()
    angle_tensor = torch.tensor(angle, dtype=torch.float64)
    turned = angle_tensor.cos() * a + angle_tensor.sin() * b
    found = [{"x": a.float()}, {"x": (scale * turned).float()}]
    cosine = float(feed(GramAccumulator(2), found).cosines()[0, 1])
    assert cosine == pytest.approx(float(angle_tensor.cos()), abs=1e-6)


@given(found=experts(), cuts=cuts, count=st.integers(1, 4))
def test_parts_add_up(found: list[Values], cuts: list[float], count: int) -> None:
    parts = [GramAccumulator(len(found)) for _ in range(count)]
    same(in_parts(parts, found, cuts).cosines(), exact_cosines(found))


@given(found=experts())
def test_the_first_row_alone(found: list[Values]) -> None:
    first = feed(GramAccumulator(len(found), first_row_only=True), found)
    assert first.sums.shape == (1, len(found))
    same(first.cosines(flat(found).norm(dim=1)), exact_cosines(found)[:1])


def test_norms_may_come_from_more_parameters_than_were_seen() -> None:
    found = [{"seen": torch.tensor([3.0])}, {"seen": torch.tensor([1.0])}]
    gram = feed(GramAccumulator(2), found)
    same(
        gram.cosines(torch.tensor([5.0, 1.0]).double()),
        torch.tensor([[9 / 25, 3 / 5], [3 / 5, 1.0]]).double(),
    )


def test_layouts_must_agree() -> None:
    with pytest.raises(OptionError, match="another layout"):
        GramAccumulator(2).merge(GramAccumulator(3))
    with pytest.raises(OptionError, match="another layout"):
        GramAccumulator(2).merge(GramAccumulator(2, first_row_only=True))
