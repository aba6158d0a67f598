from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts.stored import Rounded
from mergeready.metrics import Chunk, RoundingAccumulator
from mergeready.metrics.rounding import spacing
from tests.metrics.chunks import Values, base_of, cuts, experts, feed, in_parts

FORMATS = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FORMATS)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=20))
def test_spacing_is_that_of_the_format(dtype: torch.dtype, numbers: list[float]) -> None:
    """Against the format's own next number."""
    stored = torch.tensor(numbers).to(dtype)
    magnitude = stored.abs()
    above = torch.nextafter(magnitude.float(), torch.tensor(math.inf))
    # The next number in 16 bits: the bits, read as an integer, plus one.
    above = (magnitude.view(torch.int16) + 1).view(dtype).double()
    assert torch.equal(spacing(stored.float(), dtype).double(), above - magnitude.double())


def rounded_error(dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """Resolution as predicted, and as it is: τ of a model in fp32 is compared with τ of the same model rounded."""
    generator = torch.Generator().manual_seed(0)
    base = 0.03 * torch.randn(40_000, generator=generator)
    tuned = base + scale * torch.randn(40_000, generator=generator)
    delta = tuned.to(dtype).float() - base
    accumulator = RoundingAccumulator({"x": Rounded(dtype, "weights")})
    accumulator.update(Chunk("x", base, [delta]))
    error = (delta.double() - (tuned.double() - base.double())).norm() / delta.double().norm()
    return accumulator.resolution(), float(error)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4, 1e-5])
def test_resolution_is_the_error_that_rounding_made(dtype: torch.dtype, scale: float) -> None:
    predicted, true = rounded_error(dtype, scale)
    assert predicted == pytest.approx(true, rel=0.03)


def test_the_figures_of_the_literature_on_small_changes() -> None:
    """Weights of spread 0.03 that move by 1e-5 are lost in bf16, and by 1e-3 they are not."""
    assert rounded_error(torch.bfloat16, 1e-5)[0] > 0.9
    assert rounded_error(torch.bfloat16, 1e-3)[0] < 0.1


def product(rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, rank, generator=generator), torch.randn(rank, 150, generator=generator)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", FORMATS)
def test_rounded_factors_lose_a_share_of_their_product(rank: int, dtype: torch.dtype) -> None:
    B, A = product(rank)
    exact = B.double() @ A.double()
    delta = (B.to(dtype).double() @ A.to(dtype).double()).float()
    accumulator = RoundingAccumulator({"x": Rounded(dtype, "factors")})
    accumulator.update(Chunk("x", torch.zeros(delta.numel()), [delta.reshape(-1)]))
    true = float((delta.double() - exact).norm() / delta.double().norm())
    assert accumulator.resolution() == pytest.approx(true, rel=0.1)


def test_of_trained_rows_only_those_count() -> None:
    base, delta = torch.ones(100), torch.zeros(100)
    delta[:10] = 0.25
    whole = RoundingAccumulator({"x": Rounded(torch.bfloat16, "weights")})
    rows = RoundingAccumulator({"x": Rounded(torch.bfloat16, "rows")})
    for accumulator in (whole, rows):
        accumulator.update(Chunk("x", base, [delta]))
    assert rows.resolution() == pytest.approx(math.sqrt(10 * 2**-14 / 12) / math.sqrt(10 / 16))
    assert whole.resolution() == pytest.approx(math.sqrt(100 * 2**-14 / 12) / math.sqrt(10 / 16))
    assert math.isnan(rows.unchanged())
    assert whole.unchanged() == 0.9


def test_finer_parameters_add_to_the_norm_alone() -> None:
    accumulator = RoundingAccumulator({"coarse": Rounded(torch.bfloat16, "weights")})
    accumulator.update(Chunk("coarse", torch.ones(1), [torch.zeros(1)]))
    accumulator.update(Chunk("fine", torch.ones(1), [torch.tensor([3.0])]))
    assert accumulator.resolution() == pytest.approx(2**-7 / math.sqrt(12) / 3)
    assert accumulator.unchanged() == 1.0


def test_nothing_that_changed_has_no_resolution() -> None:
    accumulator = RoundingAccumulator({"x": Rounded(torch.bfloat16, "weights")})
    accumulator.update(Chunk("x", torch.ones(3), [torch.zeros(3)]))
    assert math.isnan(accumulator.resolution())
    assert accumulator.unchanged() == 1.0


def made(found: Sequence[Values]) -> Any:
    return RoundingAccumulator({name: Rounded(torch.bfloat16, "weights") for name in found[0]})


@given(found=experts(), cuts=cuts, count=st.integers(1, 4))
def test_parts_add_up(found: list[Values], cuts: list[float], count: int) -> None:
    together = in_parts([made(found) for _ in range(count)], found, cuts)
    whole = feed(made(found), found)
    torch.testing.assert_close(together.sums, whole.sums, rtol=1e-6, atol=0)
    assert base_of(found[0]).infos.keys() == found[0].keys()
