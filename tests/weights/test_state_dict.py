from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import FormatError
from mergeready.weights import StateDictSource
from tests.models import tiny_gpt2


def test_tied_weights_are_listed_once_under_their_first_name() -> None:
    state = tiny_gpt2().state_dict()
    source = StateDictSource(state)
    assert source.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert set(source.infos) == set(state) - {"lm_head.weight"}
    for name, value in state.items():  # also by the name that is not listed
        assert torch.equal(source.read(name), value)
        assert torch.equal(source.read_flat(name, 3, 7), value.reshape(-1)[3:7])


def test_equal_values_in_different_memory_are_not_tied() -> None:
    source = StateDictSource({"a": torch.ones(3), "b": torch.ones(3)})
    assert source.aliases == {}
    assert list(source.infos) == ["a", "b"]


def test_other_views_of_the_same_memory_are_not_tied() -> None:
    square = torch.arange(4.0).reshape(2, 2)
    views = {"whole": square, "transposed": square.T, "row": square[0], "flat": square.reshape(-1)}
    source = StateDictSource(views)
    assert source.aliases == {}
    assert all(torch.equal(source.read(name), views[name]) for name in views)


def test_empty_and_meta_tensors_are_never_tied() -> None:
    empty = {"a": torch.zeros(0), "b": torch.zeros(0)}
    meta = {"c": torch.zeros(2, device="meta"), "d": torch.zeros(2, device="meta")}
    assert StateDictSource(empty | meta).aliases == {}


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_slices_are_row_major_whatever_the_strides(data: st.DataObject, rows: int, columns: int) -> None:
    tensor = torch.arange(rows * columns).reshape(columns, rows).T
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    read = StateDictSource({"x": tensor}).read_flat("x", start, stop)
    assert read.tolist() == [value for row in tensor.tolist() for value in row][start:stop]


def test_values_are_seen_as_they_are_now_and_without_gradient() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    source = StateDictSource({"x": tensor})
    with torch.no_grad():
        tensor.fill_(2)
    assert source.read_flat("x", 0, 3).tolist() == [2, 2, 2]
    assert not source.read("x").requires_grad


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="y"):
        StateDictSource({"x": torch.zeros(1)}).read_flat("y", 0, 1)


def test_all_values_that_are_no_tensors_are_named() -> None:
    with pytest.raises(FormatError, match="checkpoint is no state dict: epoch, model"):
        StateDictSource({"epoch": 3, "x": torch.zeros(1), "model": {}}, "checkpoint")
