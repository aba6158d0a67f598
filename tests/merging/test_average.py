from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging import make_method
from tests.merging.formulas import close, grids, mean_of, merged, several_chunks

positive = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])


@given(deltas=grids(), data=st.data())
def test_is_the_weighted_mean(deltas: list[Tensor], data: st.DataObject) -> None:
    factors = [data.draw(positive) for _ in deltas]
    close(merged(make_method("average"), deltas, factors), mean_of(deltas, factors), deltas, factors)


def test_over_several_chunks() -> None:
    deltas, factors = several_chunks(), [1.0, 2.0, 0.5]
    close(merged(make_method("average"), deltas, factors), mean_of(deltas, factors), deltas, factors)


def test_equal_weights_make_the_plain_mean_of_the_weights_themselves() -> None:
    base = torch.randn(50, generator=torch.Generator().manual_seed(0))
    experts = [base + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)]
    delta = merged(make_method("average"), [expert - base for expert in experts], [1.0] * 3)
    soup = torch.stack(experts).double().mean(0)
    torch.testing.assert_close((base + delta).double(), soup, rtol=1e-6, atol=1e-6)


def test_weights_that_cancel_give_nothing() -> None:
    deltas = [torch.ones(3), torch.full((3,), 2.0)]
    assert merged(make_method("average"), deltas, [1.0, -1.0]).tolist() == [0, 0, 0]
    assert merged(make_method("average"), deltas, [0.0, 0.0]).tolist() == [0, 0, 0]


def test_an_expert_without_the_parameter_counts_as_unchanged() -> None:
    assert merged(make_method("average"), [torch.full((2,), 3.0), None, None], [1.0] * 3).tolist() == [
        1.0,
        1.0,
    ]
