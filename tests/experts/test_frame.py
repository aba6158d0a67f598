"""Frames against the matrices that they stand for, whole and in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts import frame as module
from mergeready.experts.delta import Delta, Dense, LowRank, Rows, dense
from mergeready.experts.frame import Frame, all_finite, as_matrix, changes_anything, matrix_shape
from mergeready.experts.svd import thin_svd
from tests.merging.matrices import adapters


def rows_of(shape: tuple[int, ...], *index: int) -> Rows:
    return Rows(torch.tensor(index), torch.randn(len(index), *shape[1:]), shape)


def exact(delta: Delta) -> Tensor:
    return dense(delta).double().reshape(delta.shape[0], -1)


def require_same(frame: Frame, deltas: list[Delta | None], weights: list[float]) -> None:
    for slot, core in zip(frame.slots, frame.changes, strict=True):
        delta = deltas[slot]
        assert delta is not None
        torch.testing.assert_close(frame.restore(core), weights[slot] * exact(delta), rtol=1e-5, atol=1e-7)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shape=st.sampled_from([(12, 20), (20, 12), (16, 3, 2, 2)]),
    weight=st.sampled_from([-1.5, 0.5, 1.0]),
)
def test_cores_are_the_changes_in_an_orthonormal_frame(
    ranks: list[int], shape: tuple[int, ...], weight: float
) -> None:
    deltas: list[Delta | None] = [*adapters(shape, ranks)]
    weights = [weight] * len(deltas)
    frame = Frame.of(deltas, weights)
    assert frame is not None
    assert frame.shape == (shape[0], torch.Size(shape[1:]).numel())
    require_same(frame, deltas, weights)
    assert (frame.left is not None) == (sum(ranks) < min(frame.shape))
    for basis in (frame.left, frame.right):
        if basis is not None:
            torch.testing.assert_close(basis.T @ basis, torch.eye(sum(ranks), dtype=torch.float64))
    whole = frame.whole(deltas)
    assert whole.left is None
    require_same(whole, deltas, weights)


def test_trained_rows_are_of_low_rank_and_a_dense_change_is_not() -> None:
    (low,) = adapters((40, 30), [2])
    few, full = rows_of((40, 30), 3, 17), Dense(torch.randn(40, 30))
    small = Frame.of([low, few], [1.0, 2.0])
    assert small is not None
    assert small.changes[0].shape == (4, 4)
    require_same(small, [low, few], [1.0, 2.0])
    for pair in ([low, full], [low, rows_of((40, 30), *range(9))]):
        large = Frame.of(pair, [1.0, 2.0])
        assert large is not None
        assert large.changes[1].shape == (40, 30)
        require_same(large, list(pair), [1.0, 2.0])


def test_who_changes_nothing_takes_no_part() -> None:
    low, other = adapters((12, 20), [2, 2])
    idle = LowRank(torch.zeros(12, 2), torch.randn(2, 20), (12, 20))
    deltas = [None, low, idle, other, Dense(torch.zeros(12, 20))]
    frame = Frame.of(deltas, [1.0, 1.0, 1.0, 0.0, 1.0])
    assert frame is not None
    assert frame.slots == [1]
    assert Frame.of([None, idle], [1.0, 1.0]) is None
    assert Frame.of([low], [0.0]) is None
    assert Frame.of([], []) is None
    assert [changes_anything(d) for d in deltas if d is not None] == [True, False, True, False]


def test_changes_are_new_tensors_each_time() -> None:
    value = torch.randn(4, 6, dtype=torch.float64)
    frame = Frame.of([Dense(value)], [1.0])
    assert frame is not None
    frame.changes[0].zero_()
    assert torch.equal(frame.changes[0], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_every_form(value: float) -> None:
    (low,) = adapters((12, 20), [2])
    forms = [low, rows_of((12, 20), 1), Dense(torch.randn(12, 20))]
    assert all_finite([*forms, None])
    for form in forms:
        part = form.A if isinstance(form, LowRank) else form.value
        part[0, 0] = value
        assert not all_finite([None, form])


def test_vectors_are_columns() -> None:
    delta = Dense(torch.tensor([1.0, 2.0]))
    assert matrix_shape(delta) == (2, 1)
    assert as_matrix(delta, torch.device("cpu")).tolist() == [[1.0], [2.0]]


def test_float64_is_made_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without it, factors are moved before they are widened, not after."""
    low, other = adapters((12, 20), [7, 8])
    exact_sum = exact(low)

    def refused(self: Tensor) -> Tensor:
        raise TypeError("this device has no float64")

    monkeypatch.setattr(Tensor, "double", refused)
    frame = Frame.of([low, other], [1.0, 1.0])
    assert frame is not None
    assert frame.left is None
    torch.testing.assert_close(frame.changes[0], exact_sum, rtol=1e-5, atol=1e-7)


def test_triples_of_what_never_changes_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(
        module, "thin_svd", lambda matrix, most: asked.append(matrix) or thin_svd(matrix, most)
    )
    deltas = [Dense(torch.randn(20, 30)), None, Dense(torch.randn(20, 30))]
    memory: dict[Any, Any] = {}
    found = []
    for _ in range(2):
        frame = Frame.of(deltas, [2.0, 1.0, -0.5], [None, None, memory], "layer.weight")
        assert frame is not None
        found.append([frame.changes.triples(index, 4) for index in range(2)])
    assert len(asked) == 3, "the first one's twice, as it may have changed"
    for index in range(2):
        first, again = found[0][index], found[1][index]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        left, values, right = first
        wanted = thin_svd(frame.changes[index], 4)
        torch.testing.assert_close((left * values) @ right, (wanted[0] * wanted[1]) @ wanted[2])
        assert float(values.min()) > 0
    frame.changes.triples(1, 5)
    assert len(asked) == 4, "more of them were not found before"
    other = Frame.of(deltas, [2.0, 1.0, -0.5], [None, None, memory], "other.weight")
    assert other is not None
    other.changes.triples(1, 4)
    assert len(asked) == 5, "nor those of another parameter"


def test_what_is_kept_about_triples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: dict[Any, Any] = {}
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 250)  # 4 · (20 + 30) each
    for name in ("first", "second"):
        frame = Frame.of([Dense(torch.randn(20, 30))], [1.0], [memory], name)
        assert frame is not None
        frame.changes.triples(0, 4)
    assert [key[1] for key in memory if key[0] == "singular triples" and len(key) == 3] == ["first"]
    (kept,) = (value for key, value in memory.items() if len(key) == 3)
    assert sum(part.untyped_storage().nbytes() for part in kept) == 8 * 4 * (20 + 30 + 1)
