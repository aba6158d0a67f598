"""Leading eigenvectors, and the filter against a dense solution in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergeready.training.kronecker_filter import Leading, filtering, leading


def moment(seed: int, side: int, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64)).Q
    values = decay ** torch.arange(side, dtype=torch.float64)
    return vectors * values @ vectors.T


def dense(found: Leading) -> Tensor:
    U = found.vectors
    return U * found.values @ U.T + found.rest * (torch.eye(len(U), dtype=U.dtype) - U @ U.T)


@pytest.mark.parametrize("side", [12, 60])
def test_of_few_directions_it_is_the_matrix_and_of_many_its_leading_ones(side: int) -> None:
    matrix = moment(side, side, 0.8)
    whole = leading(matrix, side)
    torch.testing.assert_close(dense(whole), matrix)
    assert float(whole.rest) == pytest.approx(0, abs=1e-12)
    part = leading(matrix, 5)
    torch.testing.assert_close(
        part.values.flip(0), 0.8 ** torch.arange(5, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert float(dense(part).trace()) == pytest.approx(float(matrix.trace()))
    left = matrix - part.vectors * part.values @ part.vectors.T
    assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(0.8**5, rel=1e-6)


def test_the_same_each_time_and_without_the_random_state() -> None:
    before = torch.get_rng_state()
    one, two = (leading(moment(1, 60, 0.9), 4) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [2, 40])
def test_the_filter_solves_its_equation(count: int) -> None:
    outputs, inputs = leading(moment(1, 40, 0.9), count), leading(moment(2, 30, 0.9), count)
    change = torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = change.clone()
    for strength in (0.0, 0.7, 1e6):
        found = change + filtering(change, outputs, inputs, strength)
        again = found + strength * dense(outputs) @ found @ dense(inputs)
        torch.testing.assert_close(again, change, rtol=1e-6, atol=1e-7)
    assert torch.equal(change, kept)


def test_single_precision_is_near_it() -> None:
    outputs, inputs = moment(1, 200, 0.95), moment(2, 100, 0.95)
    change = torch.randn(200, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = filtering(change, leading(outputs, 16), leading(inputs, 16), 5.0)
    found = filtering(change.float(), leading(outputs.float(), 16), leading(inputs.float(), 16), 5.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
