"""Each part against its formula in float64: whole, and cut anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts import Dense, LowRank, Rows, dense
from mergeready.experts.parts import BiasPart, DoraPart, LowRankPart, Part, ReplacePart, RowsPart, SumPart
from mergeready.weights import StateDictSource
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def reader(tensor: Tensor):
    return lambda start, stop: tensor.reshape(-1)[start:stop]


def check(part: Part, expected: Tensor, data: st.DataObject) -> None:
    torch.testing.assert_close(dense(part.delta()).double(), expected, rtol=1e-5, atol=1e-5)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    piece = part.flat(start, stop)
    assert piece.dtype == torch.float32
    torch.testing.assert_close(piece.double(), expected.reshape(-1)[start:stop], rtol=1e-5, atol=1e-5)


def low_rank(outputs: int, inputs: int, rank: int, seed: int, transposed: bool) -> tuple[LowRankPart, Tensor]:
    B, A = random(outputs, rank, seed=seed), random(rank, inputs, seed=seed + 1)
    exact = 0.7 * B.double() @ A.double()
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return LowRankPart(lambda: B, lambda: A, 0.7, shape, transposed), exact.T if transposed else exact


@given(outputs=sizes, inputs=sizes, rank=sizes, seed=seeds, transposed=st.booleans(), data=st.data())
def test_low_rank(
    outputs: int, inputs: int, rank: int, seed: int, transposed: bool, data: st.DataObject
) -> None:
    part, expected = low_rank(outputs, inputs, rank, seed, transposed)
    assert isinstance(part.delta(), LowRank)
    check(part, expected, data)


@given(rows=sizes, columns=sizes, seed=seeds, data=st.data())
def test_a_whole_copy(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    copy, base = random(rows, columns, seed=seed), random(rows, columns, seed=seed + 1).bfloat16()
    part = ReplacePart(reader(copy), reader(base), info(base))
    assert isinstance(part.delta(), Dense)
    check(part, copy.double() - base.double(), data)


@given(length=sizes, seed=seeds, data=st.data())
def test_a_bias(length: int, seed: int, data: st.DataObject) -> None:
    bias = random(length, seed=seed)
    check(BiasPart(lambda: bias, 2.5), 2.5 * bias.double(), data)


@given(rows=sizes, columns=sizes, count=st.integers(1, 9), seed=seeds, data=st.data())
def test_token_rows(rows: int, columns: int, count: int, seed: int, data: st.DataObject) -> None:
    base = random(rows, columns, seed=seed)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]
    trained = random(len(index), columns, seed=seed + 1)
    part = RowsPart(lambda: trained, index, StateDictSource({"x": base}), "x")
    after = base.double()
    after[index] = trained.double()
    assert isinstance(part.delta(), Rows)
    check(part, after - base.double(), data)


@given(outputs=sizes, inputs=sizes, rank=sizes, seed=seeds, transposed=st.booleans(), data=st.data())
def test_dora(outputs: int, inputs: int, rank: int, seed: int, transposed: bool, data: st.DataObject) -> None:
    """W' = m ∘ (W + D) / ‖W + D‖, the norm taken over the inputs of each output unit."""
    lora, D = low_rank(outputs, inputs, rank, seed, transposed)
    weight, magnitude = random(*D.shape, seed=seed + 2), random(outputs, seed=seed + 3).abs()
    dimension = 0 if transposed else 1
    adapted = weight.double() + D
    gain = magnitude.double() / adapted.norm(dim=dimension)
    expected = adapted * (gain[None, :] if transposed else gain[:, None]) - weight.double()
    part = DoraPart(lora, lambda: magnitude, reader(weight), info(weight), transposed)
    assert isinstance(part.delta(), Dense)
    size = float(expected.abs().max())
    torch.testing.assert_close(dense(part.delta()).double(), expected, rtol=1e-4, atol=1e-5 * size)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    torch.testing.assert_close(
        part.flat(start, stop).double(), expected.reshape(-1)[start:stop], rtol=1e-4, atol=1e-5 * size
    )


def test_dora_of_a_convolution_takes_the_norm_over_all_inputs_of_a_filter() -> None:
    weight, magnitude = random(4, 3, 2, 2, seed=0), random(1, 4, 1, 1, seed=1).abs()
    B, A = random(4, 2, seed=2), random(2, 12, seed=3)
    lora = LowRankPart(lambda: B, lambda: A, 1.0, (4, 3, 2, 2))
    adapted = weight.double() + (B.double() @ A.double()).reshape(4, 3, 2, 2)
    expected = adapted * (magnitude.double().reshape(4) / adapted.reshape(4, -1).norm(dim=1)).reshape(
        4, 1, 1, 1
    )
    part = DoraPart(lora, lambda: magnitude, reader(weight), info(weight))
    torch.testing.assert_close(dense(part.delta()).double(), expected - weight.double(), rtol=1e-5, atol=1e-5)


def test_dora_by_column_sums_norms_over_chunks() -> None:
    rows, columns = CHUNK_ELEMENTS // 8 + 3, 16
    weight, magnitude = random(rows, columns, seed=0), torch.ones(columns)
    B, A = random(columns, 1, seed=1), random(1, rows, seed=2)
    lora = LowRankPart(lambda: B, lambda: A, 1.0, (rows, columns), transposed=True)
    part = DoraPart(lora, lambda: magnitude, reader(weight), info(weight), by_column=True)
    after = weight.double() + dense(part.delta()).double()
    torch.testing.assert_close(after.norm(dim=0), torch.ones(columns).double(), rtol=1e-5, atol=1e-5)


def test_parts_of_one_parameter_add_up() -> None:
    a, b = random(5, seed=0), random(5, seed=1)
    part = SumPart([BiasPart(lambda: a, 1.0), BiasPart(lambda: b, 2.0)], (5,))
    exact = a.double() + 2 * b.double()
    torch.testing.assert_close(dense(part.delta()).double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.flat(1, 4).double(), exact[1:4], rtol=1e-6, atol=1e-6)
    assert a.tolist() == random(5, seed=0).tolist()


@pytest.mark.parametrize("kind", ["low rank", "dora", "bias", "rows"])
def test_parts_are_read_anew_at_each_access(kind: str) -> None:
    live = torch.ones(2, 1)
    base = {"x": torch.eye(2)}
    lora = LowRankPart(lambda: live, lambda: torch.ones(1, 2), 1.0, (2, 2))
    part = {
        "low rank": lora,
        "dora": DoraPart(lora, lambda: torch.ones(2), reader(base["x"]), info(base["x"])),
        "bias": BiasPart(lambda: live, 1.0),
        "rows": RowsPart(lambda: live.T, torch.tensor([0]), StateDictSource(base), "x"),
    }[kind]
    before = part.flat(0, 2).clone()
    live.fill_(3.0)
    assert not torch.equal(part.flat(0, 2), before)
