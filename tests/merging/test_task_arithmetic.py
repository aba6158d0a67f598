from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import make_method
from tests.merging.formulas import close, grids, merged, several_chunks, sum_of, weights


@given(deltas=grids(), data=st.data())
def test_is_the_weighted_sum(deltas: list[Tensor], data: st.DataObject) -> None:
    factors = [data.draw(weights) for _ in deltas]
    close(merged(make_method("task_arithmetic"), deltas, factors), sum_of(deltas, factors), deltas, factors)


def test_over_several_chunks() -> None:
    deltas, factors = several_chunks(), [1.0, -0.5, 0.3]
    close(merged(make_method("task_arithmetic"), deltas, factors), sum_of(deltas, factors), deltas, factors)


def test_an_expert_without_the_parameter_changes_nothing() -> None:
    delta = torch.tensor([1.0, 2.0])
    assert merged(make_method("task_arithmetic"), [None, delta, None], [5.0, 0.5, 3.0]).tolist() == [0.5, 1.0]


@given(deltas=grids(most=3), data=st.data())
def test_is_linear_in_the_weights(deltas: list[Tensor], data: st.DataObject) -> None:
    method = make_method("task_arithmetic")
    first, second = ([data.draw(weights) for _ in deltas] for _ in range(2))
    together = [a + b for a, b in zip(first, second, strict=True)]
    separately = merged(method, deltas, first) + merged(method, deltas, second)
    close(merged(method, deltas, together), separately.double(), deltas, [3.0] * len(deltas))
