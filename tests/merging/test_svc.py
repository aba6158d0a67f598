from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.experts import dense
from mergeready.merging import make_method
from tests.merging import matrices as exact
from tests.merging.matrices import adapters, error, matrices, matrix_of, merged, shapes, weighted

WEIGHTS = [1.0, 0.5, 2.0]


@given(shape=shapes, seed=st.integers(0, 99), alpha=st.sampled_from([0.1, 0.5, 1.0]), data=st.data())
def test_is_algorithm_one(shape: tuple[int, int], seed: int, alpha: float, data: st.DataObject) -> None:
    deltas = matrices(shape, 3, seed)
    inner = data.draw(st.sampled_from(["task_arithmetic", "average", "ties", "tsv_m"]))
    plain = matrix_of(merged(make_method(inner), deltas, WEIGHTS))
    ours = merged(make_method("svc", inner=inner, alpha=alpha), deltas, WEIGHTS)
    assert (
        error(ours, exact.svc(plain, weighted(deltas, WEIGHTS), alpha)) < 1e-4
    )  # the plain merge is in fp32


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties", "tsv_m", "iso_c", "wudi"])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (10, 3, 5, 5)])
def test_low_rank_experts_merge_as_the_matrices_that_they_are(shape: tuple[int, ...], inner: str) -> None:
    deltas = adapters(shape, [2, 3, 2])
    method = make_method("svc", inner=inner)
    whole = merged(method, [torch.from_numpy(matrix_of(d)).reshape(shape) for d in deltas], WEIGHTS)
    assert error(merged(method, deltas, WEIGHTS), matrix_of(whole)) < 1e-5


def test_what_all_experts_do_counts_once() -> None:
    (a,) = matrices((12, 20), 1)
    for count in (1, 2, 5):
        torch.testing.assert_close(
            merged(make_method("svc"), [a] * count, [1.0] * count), a, rtol=1e-5, atol=1e-7
        )


def test_what_one_expert_does_alone_stays_if_calibration_only_takes_back() -> None:
    deltas = [torch.zeros(6, 6), torch.zeros(6, 6)]
    deltas[0][:3, :3], deltas[1][3:, 3:] = torch.randn(3, 3), torch.randn(3, 3)
    torch.testing.assert_close(merged(make_method("svc", alpha=1.0), deltas, [1.0, 1.0]), sum(deltas))


def test_a_factor_on_the_merge_is_one_on_alpha() -> None:
    """Calibrating λM with α is calibrating M with α/λ."""
    deltas = matrices((12, 20), 4)
    mean = merged(make_method("svc", inner="average", alpha=0.2), deltas, [1.0] * 4)
    total = merged(make_method("svc", inner="task_arithmetic", alpha=0.8), deltas, [1.0] * 4)
    torch.testing.assert_close(mean, total, rtol=1e-5, atol=1e-7)


def test_alpha_is_one_over_the_experts_that_take_part() -> None:
    deltas = [*matrices((12, 20), 3), None, torch.zeros(12, 20)]
    given = merged(make_method("svc", alpha=1 / 3), deltas, [1.0] * 5)
    assert torch.equal(merged(make_method("svc"), deltas, [1.0] * 5), given)


def test_equal_singular_values_are_told_apart_by_the_experts() -> None:
    """After Iso-C all are equal: the result must not hang on rounding."""
    deltas = matrices((12, 20), 3)
    total = sum(weighted(deltas, [1.0] * 3))
    U, S, V = exact.svd(total, full_matrices=False)
    changes = weighted(deltas, [1.0] * 3)
    times = [
        [(S.mean() * v @ (u @ c)) / ((u @ c) @ (u @ c)) for c in changes] for u, v in zip(U.T, V, strict=True)
    ]
    counted = [sum(max(1 / 3, s) for s in row) / 3 for row in times]
    ours = merged(make_method("svc", inner="iso_c"), deltas, [1.0] * 3)
    assert error(ours, (U * (S.mean() / counted)) @ V) < 1e-5
    nudged = [
        d * (1 + 1e-6 * torch.randn(d.shape, generator=torch.Generator().manual_seed(0))) for d in deltas
    ]
    assert error(merged(make_method("svc", inner="iso_c"), nudged, [1.0] * 3), matrix_of(ours)) < 1e-3


def test_an_expert_that_does_nothing_in_a_direction_does_not_decide_about_it() -> None:
    a, b = adapters((30, 40), [2, 2])
    together = merged(make_method("svc"), [a, b], [1.0, 1.0])
    noise = dense(b) + 1e-9 * torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    assert error(merged(make_method("svc"), [a, noise], [1.0, 1.0]), matrix_of(together)) < 1e-3


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "much"])
def test_alpha_is_checked(alpha: object) -> None:
    with pytest.raises(OptionError, match="`alpha` must be a positive number or None"):
        make_method("svc", alpha=alpha)
