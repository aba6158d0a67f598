from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.merging import ElementwiseMethod, Place, make_method, method_class, method_names
from mergeready.merging.double import in_arithmetic
from mergeready.merging.method import weighted_sum
from mergeready.merging.parameter import merged_delta
from tests.merging.formulas import NAME, merged, vectors
from tests.merging.methods import built


@pytest.mark.parametrize("name", method_names())
def test_a_description_is_json_and_makes_the_same_method(name: str, tmp_path: Path) -> None:
    method = built(name, {NAME: torch.zeros(6, 5)}, 2, tmp_path)
    described = json.loads(json.dumps(method.describe()))
    assert make_method(described.pop("method"), **described) == method


ELEMENTWISE = [name for name in method_names() if issubclass(method_class(name), ElementwiseMethod)]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(997,), (37, 27), (3, 5, 64)])
def test_results_do_not_depend_on_how_a_parameter_is_cut(name: str, shape: tuple[int, ...]) -> None:
    """Bit by bit, also in the middle of a row: engines and shards may cut differently."""
    factors = [0.3, 0.7] if name == "slerp" else [0.3, 0.7, 1.1]
    method = built(name, {NAME: torch.zeros(shape)}, len(factors))
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(shape, generator=generator) for _ in factors]
    made = vectors(deltas)
    info = made[0].infos[NAME]
    prepared = [method.prepare(vector, NAME, slot) for slot, vector in enumerate(made)]

    def read(start: int, stop: int) -> list[torch.Tensor]:
        return [delta.reshape(-1)[start:stop].clone() for delta in deltas]

    joint = method.prepare_jointly(read, info, factors, prepared)

    def combine(start: int, stop: int) -> torch.Tensor:
        return method.combine(read(start, stop), factors, prepared, Place(NAME, start, stop, joint))

    whole = combine(0, info.numel)

    @given(st.lists(st.integers(1, info.numel - 1), max_size=8))
    def check(cuts: list[int]) -> None:
        borders = sorted({0, info.numel, *cuts})
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


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_sums_in_float64_change_nothing_but_rounding(name: str) -> None:
    factors = [0.5, 0.25] if name == "slerp" else [0.5, 0.25, 1.0]
    generator = torch.Generator().manual_seed(2)
    for shape in ((40, 30), (60,), (1,), ()):
        deltas = [torch.randn(shape, generator=generator) for _ in factors]
        method = built(name, {NAME: torch.zeros(shape)}, len(factors))
        double = in_arithmetic("float64", method)
        found = merged_delta(double, NAME, vectors(deltas)[0].infos[NAME], vectors(deltas), factors)
        assert found is not None
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), merged(method, deltas, factors), rtol=1e-4, atol=1e-5)
