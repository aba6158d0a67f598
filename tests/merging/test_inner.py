"""Methods around other methods: how the inner one is named, written down, and asked for vectors."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mergeready.errors import OptionError
from mergeready.merging import make_method
from tests.merging.matrices import adapters, matrices, merged

by_name = pytest.mark.parametrize("name", ["knots", "core_space", "svc"])
TIES = {"method": "ties", "density": 0.3}


@by_name
def test_the_inner_method_may_be_given_in_any_form(name: str) -> None:
    method = make_method(name, inner=TIES)
    assert method == make_method(name, inner=make_method("ties", density=0.3))
    assert method == make_method(name, inner=json.dumps(TIES))
    assert method != make_method(name, inner="ties")
    assert len({method, make_method(name, inner=TIES)}) == 1


@by_name
def test_it_is_written_down_with_its_parameters(name: str) -> None:
    method = make_method(name, inner={"method": "svc", "inner": TIES})
    described = json.loads(json.dumps(method.describe()))
    assert described["inner"]["inner"] == TIES
    assert make_method(described.pop("method"), **described) == method


@by_name
@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("tis", "no merge method 'tis'"),
        ("{ties", "neither a method's name nor JSON"),
        ({"density": 0.1}, "a mapping with `method`"),
        (3, "a mapping with `method`"),
        ({"method": "ties", "rho": 1}, "ties has no parameter rho"),
    ],
)
def test_what_is_no_method_is_refused(name: str, inner: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_method(name, inner=inner)


@by_name
def test_vectors_go_to_the_inner_method(name: str) -> None:
    pair = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -6.0])]
    assert merged(make_method(name, inner={"method": "ties", "density": 1.0}), pair, [1.0, 1.0]).tolist() == [
        2,
        -6,
    ]
    assert merged(make_method(name, inner="tsv_m"), pair, [1.0, 1.0]).tolist() == [2, -2]
    assert merged(make_method(name, inner="ties", rest="task_arithmetic"), pair, [1.0, 1.0]).tolist() == [
        4,
        -4,
    ]
    with pytest.raises(OptionError, match="`rest` must be an elementwise method"):
        make_method(name, rest="tsv_m")


@by_name
@pytest.mark.parametrize("inner", ["task_arithmetic", "average", "ties", "dare_ties", "tsv_m", "wudi"])
@pytest.mark.parametrize("low_rank", [True, False])
def test_every_kind_of_inner_method_merges(name: str, inner: str, low_rank: bool) -> None:
    deltas = adapters((20, 30), [2, 3]) if low_rank else matrices((20, 30), 2)
    method = make_method(name, inner=inner)
    together = merged(method, deltas, [1.0, 0.5])
    assert torch.isfinite(together).all()
    assert float(together.norm()) > 0
    crowd = [deltas[0], None, torch.zeros(20, 30), deltas[1]]
    if inner != "dare_ties":  # whose masks belong to positions
        if low_rank and name == "core_space":
            crowd[2] = adapters((20, 30), [2])[0]
        factors = [1.0, 0.0, 0.0, 0.5]
        torch.testing.assert_close(merged(method, crowd, factors), together, rtol=1e-5, atol=1e-6)


@by_name
def test_nothing_changes_where_no_expert_changes_anything(name: str) -> None:
    for nothing in (torch.zeros(6, 9), matrices((6, 9), 1)[0]):
        factor = 0.0 if nothing.any() else 1.0
        assert torch.equal(merged(make_method(name), [nothing, None], [factor, 1.0]), torch.zeros(6, 9))
    (low,) = adapters((6, 9), [2])
    assert torch.equal(merged(make_method(name), [low], [0.0]), torch.zeros(6, 9))


@by_name
def test_broken_values_are_not_lost(name: str) -> None:
    a, b = matrices((6, 9), 2)
    b[1, 2] = math.nan
    for weights in ([1.0, 1.0], [1.0, 0.0]):
        assert not torch.isfinite(merged(make_method(name), [a, b], weights)).any()
