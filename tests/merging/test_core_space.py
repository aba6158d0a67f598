from __future__ import annotations

import pytest
import torch
from numpy.linalg import svd

from mergeready.experts import LowRank
from mergeready.merging import make_method
from tests.merging import matrices as exact
from tests.merging.formulas import elected, trimmed
from tests.merging.matrices import Matrix, adapters, error, matrices, matrix_of, merged, weighted

WEIGHTS = [1.0, 0.5, 2.0]


def ties(parts: list[Matrix]) -> Matrix:
    return elected([trimmed(torch.from_numpy(part.copy()), 0.2) for part in parts], [1.0] * 3).numpy()


def in_core_space(deltas: list[LowRank], merge: exact.Formula, weights: list[float]) -> Matrix:
    """Panariello et al., section 4, from the bases of stacked factors."""
    left = svd(torch.cat([d.B for d in deltas], 1).double().numpy(), full_matrices=False)[0]
    right = svd(torch.cat([d.A for d in deltas], 0).double().numpy(), full_matrices=False)[2]
    cores = [left.T @ change @ right.T for change in weighted(deltas, weights)]
    return left @ merge(cores) @ right


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (10, 3, 5, 5), (5, 40)])
@pytest.mark.parametrize(
    ("inner", "formula"),
    [("tsv_m", exact.tsv_m), ("iso_c", exact.iso_c), ("iso_cts", exact.iso_cts), ("task_arithmetic", sum)],
)
def test_merges_cores(shape: tuple[int, ...], inner: str, formula: exact.Formula) -> None:
    deltas = adapters(shape, [2, 2, 2])
    ours = merged(make_method("core_space", inner=inner), deltas, WEIGHTS)
    assert error(ours, in_core_space(deltas, formula, WEIGHTS)) < 1e-5


def test_an_inner_method_of_coordinates_sees_the_paper_s_bases() -> None:
    deltas = adapters((30, 40), [2, 3, 4])
    ours = merged(make_method("core_space", inner="ties"), deltas, [1.0] * 3)
    assert error(ours, in_core_space(deltas, ties, [1.0] * 3)) < 1e-5


def test_nothing_is_lost_on_the_way() -> None:
    deltas = adapters((30, 40), [2, 3, 4])
    ours = merged(make_method("core_space", inner="task_arithmetic"), deltas, WEIGHTS)
    assert error(ours, sum(weighted(deltas, WEIGHTS))) < 1e-6


def test_where_an_expert_is_not_of_low_rank_the_space_is_the_whole_one() -> None:
    mixed = [*adapters((12, 20), [2]), *matrices((12, 20), 1)]
    ours = merged(make_method("core_space"), mixed, [1.0, 0.5])
    assert torch.equal(ours, merged(make_method("tsv_m"), mixed, [1.0, 0.5]))


def test_equal_experts_and_ranks_larger_than_a_side() -> None:
    (a,) = adapters((6, 20), [5])
    twins = merged(make_method("core_space", inner="average"), [a, a], [1.0, 1.0])
    assert error(twins, matrix_of(a)) < 1e-6
