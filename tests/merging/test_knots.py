from __future__ import annotations

import pytest
import torch

from mergeready.experts import dense
from mergeready.merging import make_method
from tests.merging import matrices as exact
from tests.merging.formulas import elected, trimmed
from tests.merging.matrices import Matrix, adapters, error, matrices, matrix_of, merged, weighted

WEIGHTS = [1.0, 0.5, 2.0]


def ties(parts: list[Matrix]) -> Matrix:
    tensors = [trimmed(torch.from_numpy(part.copy()), 0.2) for part in parts]
    return elected(tensors, WEIGHTS).numpy()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (60, 7), (7, 60)])
def test_is_ties_in_the_experts_common_basis(shape: tuple[int, int]) -> None:
    deltas = matrices(shape, 3)
    ours = merged(make_method("knots"), deltas, WEIGHTS)
    assert error(ours, exact.knots(weighted(deltas, [1.0] * 3), ties)) < 1e-5


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (10, 3, 5, 5)])
def test_low_rank_experts(shape: tuple[int, ...]) -> None:
    deltas = adapters(shape, [2, 3, 2])
    ours = merged(make_method("knots"), deltas, WEIGHTS)
    assert error(ours, exact.knots(weighted(deltas, [1.0] * 3), ties)) < 1e-5
    whole = merged(
        make_method("knots"), [torch.from_numpy(matrix_of(d)).reshape(shape) for d in deltas], WEIGHTS
    )
    assert error(ours, matrix_of(whole)) < 1e-5


@pytest.mark.parametrize("inner", ["task_arithmetic", "average", "tsv_m", "iso_c", "wudi"])
def test_a_method_that_commutes_with_rotations_gains_nothing(inner: str) -> None:
    low_rank = adapters(
        (12, 20), [2, 1, 2]
    )  # whose aligned parts have fewer rows, of which TSV-M gives each a share
    for deltas in (matrices((12, 20), 3), *([low_rank] if inner != "tsv_m" else [])):
        direct = merged(make_method(inner), deltas, WEIGHTS)
        assert error(merged(make_method("knots", inner=inner), deltas, WEIGHTS), matrix_of(direct)) < 1e-5


def test_one_expert_without_trimming_is_itself() -> None:
    method = make_method("knots", inner={"method": "ties", "density": 1.0})
    (low,) = adapters((12, 20), [3])
    torch.testing.assert_close(merged(method, [low], [1.0]), dense(low), rtol=1e-5, atol=1e-6)
