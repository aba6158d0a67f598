from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import NonFiniteError, OptionError
from mergeready.experts import TaskVector
from mergeready.experts.delta import Delta, dense
from mergeready.merging import ElementwiseMethod, MatrixMethod, MergeMethod, Place, make_method
from mergeready.merging.parameter import (
    add_delta,
    all_finite,
    check_dtype,
    check_scale,
    check_weights,
    merged_chunks,
    merged_delta,
    raise_if_broken,
    require_finite_chunk,
)
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo, chunk_ranges
from tests.merging.formulas import NAME, vectors


@dataclass(frozen=True, kw_only=True)
class Counted(ElementwiseMethod):
    """A sum that notes for which experts it was prepared."""

    name: ClassVar[str] = "counted"
    prepared_for: ClassVar[list[tuple[str, int]]] = []

    def prepare(self, vector: TaskVector, name: str, slot: int) -> int:
        self.prepared_for.append((vector.label, slot))
        return slot

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        assert [p for p in prepared if p is not None] == [i for i, p in enumerate(prepared) if p is not None]
        return sum(delta * weight for delta, weight in zip(deltas, weights, strict=True))


@dataclass(frozen=True, kw_only=True)
class Transposed(MatrixMethod):
    """Needs the whole matrix: each sum is transposed."""

    name: ClassVar[str] = "transposed"

    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        assert (place.start, place.stop) == (0, math.prod(next(d.shape for d in deltas if d is not None)))
        return sum(w * dense(d) for d, w in zip(deltas, weights, strict=True) if d is not None).T.contiguous()


@dataclass(frozen=True, kw_only=True)
class Centred(ElementwiseMethod):
    """Needs one number about all experts: the mean of their sum is taken off."""

    name: ClassVar[str] = "centred"

    def prepare_jointly(self, read: Any, info: TensorInfo, weights: Sequence[float], prepared: Any) -> float:
        return sum(float(sum(read(a, b)).sum()) for a, b in chunk_ranges(info)) / info.numel

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        return sum(deltas) - place.joint


def info(*shape: int) -> TensorInfo:
    return TensorInfo(shape, torch.float32)


def test_chunks_cover_a_parameter_in_order() -> None:
    numel = 2 * CHUNK_ELEMENTS + 3
    delta = torch.arange(float(numel))
    chunks = list(merged_chunks(make_method("task_arithmetic"), NAME, info(numel), vectors([delta]), [1.0]))
    assert [(a, b) for a, b, _ in chunks] == [
        (0, CHUNK_ELEMENTS),
        (CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS),
        (2 * CHUNK_ELEMENTS, numel),
    ]
    assert torch.equal(torch.cat([values for _, _, values in chunks]), delta)


def test_each_expert_is_prepared_once_under_its_position() -> None:
    Counted.prepared_for.clear()
    delta = torch.ones(2 * CHUNK_ELEMENTS)
    result = merged_delta(Counted(), NAME, info(*delta.shape), vectors([delta, None, delta]), [1.0, 1.0, 2.0])
    assert Counted.prepared_for == [("expert 0", 0), ("expert 2", 2)]
    assert float(result.min()) == float(result.max()) == 3.0


def test_what_was_prepared_is_remembered_for_experts_that_do_not_change() -> None:
    Counted.prepared_for.clear()
    fixed, changing = vectors([torch.ones(3), torch.ones(3)])
    fixed.memory = {}
    for _ in range(3):
        merged_delta(Counted(), NAME, info(3), [fixed, changing], [1.0, 1.0])
    assert Counted.prepared_for.count(("expert 0", 0)) == 1
    assert Counted.prepared_for.count(("expert 1", 1)) == 3
    merged_delta(
        Counted(), NAME, info(3), [changing, fixed], [1.0, 1.0]
    )  # at another position: prepared anew
    assert Counted.prepared_for.count(("expert 0", 1)) == 1


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "knots", "svc"])
def test_spectral_merges_are_the_same_bits_with_what_is_remembered(name: str) -> None:
    made = vectors([torch.randn(20, 30) for _ in range(3)])
    method, weights = make_method(name), [1.0, 0.5, -2.0]
    wanted = merged_delta(method, NAME, info(20, 30), made, weights)
    assert wanted is not None
    made[1].memory, made[2].memory = {}, {}
    for _ in range(2):
        again = merged_delta(method, NAME, info(20, 30), made, weights)
        assert again is not None
        assert torch.equal(again, wanted)


def test_memory_belongs_to_a_method_with_its_parameters() -> None:
    (vector,) = vectors([torch.tensor([1.0, 2.0, 3.0, 4.0])])
    vector.memory = {}
    for density, expected in ((0.25, [0, 0, 0, 4]), (0.5, [0, 0, 3, 4]), (0.25, [0, 0, 0, 4])):
        result = merged_delta(make_method("ties", density=density), NAME, info(4), [vector], [1.0])
        assert result.tolist() == expected


def test_nothing_is_merged_where_no_expert_has_a_delta() -> None:
    assert merged_delta(make_method("ties"), "other", info(3), vectors([torch.ones(3)]), [1.0]) is None
    assert merged_delta(make_method("ties"), NAME, info(3), [], []) is None


METHODS = [
    "average",
    "breadcrumbs",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "model_stock",
    "pcb",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


@pytest.mark.parametrize("name", METHODS)
def test_experts_are_not_written_to(name: str) -> None:
    deltas = [torch.randn(50), torch.randn(50)]
    before = [delta.clone() for delta in deltas]
    merged_delta(make_method(name), NAME, info(50), vectors(deltas), [0.5, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


def test_a_method_of_another_kind_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strange(MergeMethod):
        name: ClassVar[str] = "strange"

    with pytest.raises(OptionError, match="strange is of an unknown kind"):
        merged_delta(Strange(), NAME, info(3), vectors([torch.ones(3)]), [1.0])


@given(
    scale=st.floats(-4, 4, width=32),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    out=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_base_and_delta_are_added_in_fp32_and_rounded_once(
    scale: float, seed: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(64, generator=generator).to(dtype)
    delta = 0.1 * torch.randn(64, generator=generator)
    exact = base.double() + scale * delta.double()
    ours = add_delta(base, delta, scale, out)
    assert ours.dtype == out
    # Half a unit in the last place of the output, and a little for the two fp32 steps.
    limit = exact.abs() * torch.finfo(out).eps / 2 * 1.001 + 1e-6
    assert bool(((ours.double() - exact).abs() <= limit).all())


def test_adding_writes_to_neither() -> None:
    base, delta = torch.ones(3), torch.ones(3)
    add_delta(base, delta, 2.0, torch.float32)
    assert base.tolist() == delta.tolist() == [1, 1, 1]


def test_weights() -> None:
    assert check_weights(None, 3) == [1.0, 1.0, 1.0]
    assert check_weights((1, -2), 2) == [1.0, -2.0]
    assert check_weights([], 0) == []
    with pytest.raises(OptionError, match="`weights` has 2 values for 3 experts"):
        check_weights([1, 2], 3)
    with pytest.raises(OptionError, match="`weights` must be finite, not nan, inf"):
        check_weights([1, math.nan, math.inf], 3)
    for wrong, message in (("12", "a list of numbers, not '12'"), (3, "a list"), ([1, "1e-1"], "not '1e-1'")):
        with pytest.raises(OptionError, match=f"`weights` must be .*{message}"):
            check_weights(wrong, 2)
    assert check_weights(torch.tensor([1.0, 2.0]), 2) == [1.0, 2.0]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_must_be_finite(scale: float) -> None:
    with pytest.raises(OptionError, match="`scale` must be finite"):
        check_scale(scale)
    assert check_scale(-2) == -2.0
    with pytest.raises(OptionError, match="`scale` must be numeric, not '1e-1'"):
        check_scale("1e-1")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_must_be_floating(dtype: torch.dtype) -> None:
    with pytest.raises(OptionError, match="`dtype` must be a floating dtype"):
        check_dtype(dtype)
    assert check_dtype(None) is None
    assert check_dtype(torch.bfloat16) == torch.bfloat16


def test_broken_parameters_are_noted_once() -> None:
    broken: list[str] = []
    for values in ([1.0, math.nan], [math.inf, 1.0], [1.0, 1.0]):
        require_finite_chunk(torch.tensor(values), "x", broken)
    require_finite_chunk(torch.ones(2), "y", broken)
    assert broken == ["x"]
    raise_if_broken([], [])


def test_the_expert_to_blame_is_named() -> None:
    good, bad = vectors([torch.ones(3), torch.tensor([1.0, math.nan, 1.0])])
    with pytest.raises(NonFiniteError, match=f"values in expert 1: {NAME}"):
        raise_if_broken([NAME], [good, bad])
    with pytest.raises(
        NonFiniteError, match=r"after merging: layer\.weight\. .* A scale or weight is too large"
    ):
        raise_if_broken([NAME], [good])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["one", "all", "infinite"])
def test_no_method_loses_sight_of_nan(name: str, where: str) -> None:
    """Not by trimming or dropping it, not by outvoting it, not by a weight of zero."""
    bad = torch.randn(100, generator=torch.Generator().manual_seed(0))
    bad[0 if where != "all" else slice(None)] = math.inf if where == "infinite" else math.nan
    deltas, factors = [torch.ones(100), bad, torch.ones(100)], [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    if name == "slerp":
        deltas, factors = deltas[:2], [[1.0, 1.0], [1.0, 0.0]]
    given: list[dict[str, float]] = [{}]
    if "density" in make_method(name).describe():
        given += [{"density": 0.01}, {"density": 1}]
    for weights in factors:
        for parameters in given:
            if name.startswith("della") and parameters:
                parameters["epsilon"] = 0.005
            method = make_method(name, **parameters)
            result = merged_delta(method, NAME, info(100), vectors(deltas), weights)
            assert not bool(torch.isfinite(result).all())


def test_a_matrix_method_sees_whole_deltas_and_leaves_vectors_to_another() -> None:
    delta = torch.arange(6.0).reshape(2, 3)
    merged = merged_delta(Transposed(), NAME, info(2, 3), vectors([delta, None]), [2.0, 1.0])
    assert torch.equal(merged, (2 * delta).T.reshape(2, 3))
    flat = merged_delta(Transposed(), NAME, info(3), vectors([torch.ones(3)] * 2), [2.0, 1.0])
    assert torch.equal(flat, 3 * torch.ones(3))
    averaged = merged_delta(
        Transposed(rest="average"), NAME, info(3), vectors([torch.ones(3)] * 2), [2.0, 1.0]
    )
    assert torch.equal(averaged, torch.ones(3))


def test_a_joint_statistic_covers_all_pieces() -> None:
    delta = torch.arange(2.0 * CHUNK_ELEMENTS)
    merged = merged_delta(Centred(), NAME, info(len(delta)), vectors([delta, None, -delta / 2]), [1.0] * 3)
    torch.testing.assert_close(merged, delta / 2 - (delta / 2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_finite_though_their_sum_is_not(dtype: torch.dtype) -> None:
    values = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    for broken in (float("nan"), float("inf"), -float("inf")):
        values[500] = broken
        assert not all_finite(values)


def test_a_base_in_float64_keeps_its_digits() -> None:
    base = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1.0, 0.3):
        assert torch.equal(add_delta(base, torch.zeros(100), scale, torch.float64), base)
        change = torch.full((100,), 2.0**-10)
        assert torch.equal(add_delta(base, change, scale, torch.float64), base + change.mul(scale).double())
    assert torch.equal(add_delta(base, torch.ones(100), 0.0, torch.float32), base.float())
