from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.merging import ElementwiseMethod, Place, make_method, method_class, method_names
from mergeready.merging.method import weighted_sum
from tests.merging.formulas import NAME, vectors
from tests.merging.methods import built


@pytest.mark.parametrize("name", method_names())
def test_a_description_is_json_and_makes_the_same_method(name: str, tmp_path: Path) -> None:
    method = built(name, {NAME: torch.zeros(6, 5)}, 2, tmp_path)
    described = json.loads(json.dumps(method.describe()))
    assert make_method(described.pop("method"), **described) == method


ELEMENTWISE = [name for name in method_names() if issubclass(method_class(name), ElementwiseMethod)]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_results_do_not_depend_on_how_a_parameter_is_cut(name: str) -> None:
    """Bit by bit: engines and shards may cut differently."""
    method = built(name, {NAME: torch.zeros(997)}, 3)
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(997, generator=generator) for _ in range(3)]
    factors = [0.3, 0.7, 1.1]
    made = vectors(deltas)
    prepared = [method.prepare(vector, NAME, slot) for slot, vector in enumerate(made)]

    def combine(start: int, stop: int) -> torch.Tensor:
        pieces = [delta[start:stop].clone() for delta in deltas]
        return method.combine(pieces, factors, prepared, Place(NAME, start, stop))

    whole = combine(0, 997)

    @given(st.lists(st.integers(1, 996), max_size=8))
    def check(cuts: list[int]) -> None:
        borders = sorted({0, 997, *cuts})
        pieces = [combine(a, b) for a, b in pairwise(borders)]
        assert torch.equal(torch.cat(pieces), whole)

    check()


@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_weighted_sum(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(40, generator=generator) for _ in range(count)]
    factors = torch.randn(count, generator=generator).tolist()
    exact = sum(w * d.double() for d, w in zip(deltas, factors, strict=True))
    torch.testing.assert_close(weighted_sum(deltas, factors).double(), exact, rtol=1e-5, atol=1e-5)


def test_one_weight_an_expert() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        weighted_sum([torch.ones(2), torch.ones(2)], [1.0])
