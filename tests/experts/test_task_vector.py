from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import NonFiniteError
from mergeready.experts import (
    BaseIdentity,
    DeltaTaskVector,
    Dense,
    FullTaskVector,
    LowRank,
    TaskVector,
    squared_norms,
)
from mergeready.weights import StateDictSource
from mergeready.weights.source import CHUNK_ELEMENTS

NOBODY = BaseIdentity({})
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def full(
    expert: dict[str, Tensor], base: dict[str, Tensor], names: dict[str, str] | None = None
) -> TaskVector:
    return FullTaskVector(
        StateDictSource(expert, "expert"),
        StateDictSource(base, "base"),
        names or {n: n for n in base},
        NOBODY,
    )


def in_memory(**values: Tensor) -> TaskVector:
    deltas = {name: Dense(value) for name, value in values.items()}
    return DeltaTaskVector(deltas, StateDictSource(values).infos, NOBODY, "expert")


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9), ours=dtypes, theirs=dtypes)
def test_a_full_task_vector_is_the_difference(
    data: st.DataObject, rows: int, columns: int, ours: torch.dtype, theirs: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    base = torch.randn(rows, columns, generator=generator).to(theirs)
    expert = torch.randn(rows, columns, generator=generator).to(ours)
    vector = full({"m.x": expert}, {"x": base}, {"x": "m.x"})
    exact = expert.double() - base.double()
    assert vector["x"].value.dtype == torch.float32
    torch.testing.assert_close(vector["x"].value.double(), exact, rtol=1e-6, atol=1e-6)
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    piece = vector.flat("x", start, stop)
    assert torch.equal(piece, vector["x"].value.reshape(-1)[start:stop])
    given_base = base.reshape(-1)[start:stop].float()
    assert torch.equal(vector.flat("x", start, stop, given_base), piece)


def test_small_changes_of_half_precision_weights_are_exact() -> None:
    base = torch.full((4,), 1.0).bfloat16()
    expert = base + 2**-7  # the next larger number that bfloat16 has
    assert full({"x": expert}, {"x": base}).flat("x", 0, 4).tolist() == [2**-7] * 4


def test_pieces_are_new_tensors() -> None:
    for vector in (full({"x": torch.ones(4)}, {"x": torch.zeros(4)}), in_memory(x=torch.ones(4))):
        vector.flat("x", 0, 4).fill_(9)
        assert vector.flat("x", 0, 4).tolist() == [1, 1, 1, 1]


def test_a_live_source_is_read_anew() -> None:
    expert = torch.ones(3)
    vector = full({"x": expert}, {"x": torch.zeros(3)})
    expert.fill_(2)
    assert vector.flat("x", 0, 3).tolist() == [2, 2, 2]


def test_a_task_vector_is_a_mapping() -> None:
    values = {"b": torch.ones(2, 2), "a": torch.zeros(3)}
    for vector in (full(values, values), in_memory(**values)):
        assert list(vector) == ["b", "a"]
        assert len(vector) == 2
        assert "a" in vector
        assert "c" not in vector
        assert vector.infos["b"].shape == (2, 2)
        assert vector["b"].shape == (2, 2)
        with pytest.raises(KeyError):
            vector["c"]


def test_infos_are_the_base_s() -> None:
    vector = full(
        {"x": torch.ones(2).double()}, {"x": torch.ones(2).bfloat16(), "y": torch.ones(1)}, {"x": "x"}
    )
    assert vector.infos.keys() == {"x"}
    assert vector.infos["x"].dtype == torch.bfloat16


def test_deltas_in_memory_keep_their_form() -> None:
    low = LowRank(torch.ones(3, 1), torch.ones(1, 2), (3, 2))
    vector = DeltaTaskVector({"x": low}, StateDictSource({"x": torch.zeros(3, 2)}).infos, NOBODY, "e")
    assert vector["x"] is low
    assert vector.flat("x", 1, 3).tolist() == [1, 1]


@given(scale=st.sampled_from([1e-12, 1.0, 1e6]), seed=st.integers(0, 99))
def test_squared_norms(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = {"x": scale * torch.randn(50, 7, generator=generator), "y": torch.zeros(3), "z": torch.zeros(0)}
    norms = squared_norms(in_memory(**values))
    assert norms.keys() == values.keys()
    for name, value in values.items():
        assert norms[name] == pytest.approx(float(value.double().square().sum()), rel=1e-6, abs=0)


def test_squared_norms_over_several_chunks() -> None:
    value = torch.randn(3 * CHUNK_ELEMENTS + 5, generator=torch.Generator().manual_seed(0))
    exact = float(value.double().square().sum())
    assert squared_norms(in_memory(x=value))["x"] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_all_parameters_that_are_not_finite_are_listed(bad: float) -> None:
    values = {name: torch.ones(5) for name in ("a", "b", "c")}
    values["a"][3] = values["c"][0] = bad
    with pytest.raises(NonFiniteError, match="expert holds NaN or infinite values in a, c"):
        squared_norms(in_memory(**values))
