"""What all methods on singular vectors have in common, on every form that deltas come in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.experts import Rows, dense
from mergeready.merging import make_method
from tests.merging import matrices as exact
from tests.merging.matrices import adapters, error, factors, matrices, matrix_of, merged, shapes, weighted

FORMULAS = {
    "tsv_m": exact.tsv_m,
    "iso_c": exact.iso_c,
    "iso_cts": exact.iso_cts,
    "wudi": lambda changes: exact.wudi(changes, ridge=make_method("wudi").ridge),
}
NAMES = sorted(FORMULAS)
by_name = pytest.mark.parametrize("name", NAMES)


@by_name
def test_equals_the_paper_s_formula(name: str) -> None:
    @given(shape=shapes, seed=st.integers(0, 999), data=st.data(), count=st.integers(1, 5))
    def check(shape: tuple[int, int], seed: int, data: st.DataObject, count: int) -> None:
        weights = [data.draw(factors) for _ in range(count)]
        deltas = matrices(shape, count, seed)
        assert (
            error(merged(make_method(name), deltas, weights), FORMULAS[name](weighted(deltas, weights)))
            < 1e-5
        )

    check()


@by_name
@pytest.mark.parametrize("shape", [(48, 60), (60, 48), (10, 3, 4, 4)])
def test_low_rank_experts_merge_as_the_matrices_that_they_are(name: str, shape: tuple[int, ...]) -> None:
    deltas = adapters(shape, [2, 3, 2])
    weights = [1.0, -0.5, 2.0]
    small = merged(make_method(name), deltas, weights)
    whole = merged(
        make_method(name), [torch.from_numpy(matrix_of(d)).reshape(shape) for d in deltas], weights
    )
    assert error(small, matrix_of(whole)) < 1e-6
    # Rounded to fp32 they have full rank, and whitening amplifies the noise that belongs to their own directions.
    rounded = merged(make_method(name), [dense(d) for d in deltas], weights)
    assert error(small, matrix_of(rounded)) < 1e-4


@by_name
def test_trained_rows_merge_as_the_matrices_that_they_are(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Rows(torch.tensor(index), torch.randn(2, 30, generator=generator), (40, 30))
        for index in ([3, 7], [7, 30])
    ]
    lora = adapters((40, 30), [2])
    for deltas in (rows, rows + lora):
        small = merged(make_method(name), deltas, [1.0] * len(deltas))
        whole = merged(make_method(name), [dense(d) for d in deltas], [1.0] * len(deltas))
        torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-6)


@by_name
def test_experts_that_change_nothing_take_no_part(name: str) -> None:
    a, b = matrices((12, 20), 2)
    alone = merged(make_method(name), [a, b], [1.0, 0.5])
    crowd = [a, torch.zeros(12, 20), None, b, torch.randn(12, 20)]
    assert torch.equal(merged(make_method(name), crowd, [1.0, 1.0, 1.0, 0.5, 0.0]), alone)
    assert torch.equal(
        merged(make_method(name), [torch.zeros(12, 20), None], [1.0, 1.0]), torch.zeros(12, 20)
    )


@by_name
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_values_are_not_lost(name: str, value: float) -> None:
    a, b = matrices((12, 20), 2)
    b[3, 4] = value
    for weights in ([1.0, 1.0], [1.0, 0.0]):
        assert not torch.isfinite(merged(make_method(name), [a, b], weights)).any()


@by_name
def test_does_not_write_to_the_experts(name: str) -> None:
    deltas = matrices((12, 20), 2)
    before = [delta.clone() for delta in deltas]
    merged(make_method(name), deltas, [0.5, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


@by_name
def test_does_not_depend_on_how_the_experts_lie_in_memory(name: str) -> None:
    """Bit by bit: a live adapter's factors may be transposed views, a file's are not."""
    deltas = adapters((40, 30), [3, 2])
    views = [type(d)(d.B.T.contiguous().T, torch.cat([d.A, d.A])[: len(d.A)], d.shape) for d in deltas]
    assert torch.equal(*(merged(make_method(name), group, [1.0, 0.5]) for group in (deltas, views)))
    whole = matrices((12, 20), 2)
    shifted = [torch.cat([torch.zeros(1), d.reshape(-1)])[1:].reshape(d.shape) for d in whole]
    assert torch.equal(*(merged(make_method(name), group, [1.0, 0.5]) for group in (whole, shifted)))


@by_name
def test_commutes_with_rotations(name: str) -> None:
    deltas = [d.double() for d in matrices((12, 20), 3)]
    Q, P = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (12, 20))
    turned = merged(make_method(name), [(Q @ d @ P).float() for d in deltas], [1.0] * 3)
    straight = merged(make_method(name), [d.float() for d in deltas], [1.0] * 3)
    assert error(turned, (Q @ straight.double() @ P).numpy()) < 1e-5


@by_name
def test_vectors_are_averaged(name: str) -> None:
    pair = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert merged(make_method(name), pair, [1.0, 1.0]).tolist() == [2.0, 4.0]
    assert merged(make_method(name, rest="task_arithmetic"), pair, [1.0, 1.0]).tolist() == [4.0, 8.0]


@by_name
def test_the_method_for_vectors_must_be_elementwise(name: str) -> None:
    with pytest.raises(OptionError, match="`rest` must be an elementwise method, not 'tsv_m'"):
        make_method(name, rest="tsv_m")
    with pytest.raises(OptionError, match="no merge method 'sum'"):
        make_method(name, rest="sum")


def test_the_common_share_is_checked() -> None:
    with pytest.raises(OptionError, match=r"`common` must be in \(0, 1\]"):
        make_method("iso_cts", common=0)


def test_iso_cts_with_a_small_common_share_leaves_no_task_without_its_own() -> None:
    deltas = matrices((3, 30), 2)
    assert torch.linalg.matrix_rank(merged(make_method("iso_cts", common=0.01), deltas, [1.0, 1.0])) == 3
