from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError, NonFiniteError, OptionError
from mergeready.experts import BaseIdentity, Delta, DeltaTaskVector, Dense, LowRank, dense
from mergeready.metrics.right_overlap import right_overlap
from mergeready.metrics.singular_interference import relative_interference
from mergeready.metrics.subspaces import SubspaceComparison, compare_subspaces
from mergeready.weights.source import TensorInfo
from tests.merging.matrices import adapters, matrices
from tests.metrics.test_subspace_alignment import exact


def vector(
    deltas: dict[str, Delta | Tensor], label: str = "expert", base: str = "a digest"
) -> DeltaTaskVector:
    made = {name: Dense(d) if isinstance(d, Tensor) else d for name, d in deltas.items()}
    infos = {name: TensorInfo(tuple(d.shape), torch.float32) for name, d in made.items()}
    return DeltaTaskVector(made, infos, BaseIdentity({"x": base}), label)


def close(a: SubspaceComparison, b: SubspaceComparison, tolerance: float = 1e-5) -> None:
    for name in ("alignment", "overlap", "interference", "times_over", "stable_rank", "effective_rank"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=tolerance, err_msg=name)
    assert a.matrices == b.matrices


def test_is_the_mean_over_matrices() -> None:
    first, second = matrices((12, 20), 3), matrices((24, 9), 3, seed=5)
    bias = torch.ones(7)
    vectors = [
        vector({"a": x, "b": y, "bias": bias}, f"e{i}")
        for i, (x, y) in enumerate(zip(first, second, strict=True))
    ]
    found = compare_subspaces(vectors, rank=4)
    assert (found.labels, found.matrices) == (["e0", "e1", "e2"], 2)
    for i in range(3):
        ratios = [exact(p[i].double().numpy(), sum(p).double().numpy(), 0.95) for p in (first, second)]  # type: ignore[union-attr]
        assert found.alignment[i] == pytest.approx(np.mean(ratios), rel=1e-6)
        for j in range(3):
            overlaps = [right_overlap(p[i], p[j], 4) for p in (first, second)]
            assert found.overlap[i][j] == pytest.approx(np.mean(overlaps), rel=1e-6)
    assert found.interference == pytest.approx(
        np.mean([relative_interference(p, rank=4) for p in (first, second)]), rel=1e-6
    )
    assert found.overlap_by_chance == pytest.approx((4 / 20 + 4 / 9) / 2)


@pytest.mark.parametrize("shape", [(48, 60), (10, 3, 4, 4)])
def test_low_rank_experts_are_what_their_matrices_are(shape: tuple[int, ...]) -> None:
    deltas = adapters(shape, [2, 3, 2])
    small = compare_subspaces([vector({"a": delta}) for delta in deltas], rank=3)
    whole = compare_subspaces([vector({"a": dense(delta)}) for delta in deltas], rank=3)
    close(small, whole)


def test_kernels_are_matrices() -> None:
    deltas = [torch.randn(6, 2, 3, 3) for _ in range(2)]
    folded = compare_subspaces([vector({"a": delta.flatten(1)}) for delta in deltas])
    close(compare_subspaces([vector({"a": delta}) for delta in deltas]), folded)


def test_another_merge_can_be_compared_with() -> None:
    a, b = matrices((12, 20), 2)
    sure = compare_subspaces([vector({"x": a}), vector({"x": b})])
    close(compare_subspaces([vector({"x": a}), vector({"x": b})], vector({"x": a + b})), sure)
    only = compare_subspaces([vector({"x": a}), vector({"x": b})], vector({"x": a}), kept=1.0)
    assert only.alignment[0] == pytest.approx(1.0)
    nothing = compare_subspaces([vector({"x": a}), vector({"x": b})], vector({"y": a}))
    assert nothing.alignment == [0.0, 0.0]
    assert math.isnan(nothing.times_over)


def test_matrices_of_one_expert_only_are_left_out() -> None:
    a, b = matrices((12, 20), 2)
    found = compare_subspaces(
        [vector({"x": a, "own": b}), vector({"x": b, "other": a}), vector({"third": torch.randn(3, 4)})]
    )
    assert found.matrices == 1
    assert math.isnan(found.alignment[2])
    assert math.isnan(found.overlap[0][2])
    assert found.overlap[0][0] == 1.0


def test_factors_that_cancel_change_nothing() -> None:
    B, A = torch.zeros(30, 2), torch.zeros(2, 20)
    B[:, 0], A[1] = torch.randn(30), torch.randn(20)
    nothing, (low,) = LowRank(B, A, (30, 20)), adapters((30, 20), [2])
    for deltas in ([nothing, nothing], [nothing, low]):
        assert compare_subspaces([vector({"x": delta}) for delta in deltas]).matrices == 0
    found = compare_subspaces([vector({"x": delta}) for delta in (low, nothing, low)])
    assert found.matrices == 1
    assert math.isnan(found.alignment[1])
    assert found.interference == pytest.approx(1.0)


def test_experts_that_cancel_have_no_merge() -> None:
    (a,) = matrices((12, 20), 1)
    found = compare_subspaces([vector({"x": a}), vector({"x": -a})])
    assert found.alignment == [0.0, 0.0]
    assert math.isnan(found.times_over)


def check_broken(*values: Sequence[Tensor]) -> None:
    names = dict.fromkeys(f"x{i}" for i in range(len(values)))
    experts = [vector(dict(zip(names, pair, strict=True))) for pair in zip(*values, strict=True)]
    compare_subspaces(experts)


def test_broken_values_are_named_all_at_once() -> None:
    a, b = matrices((12, 20), 2)
    broken = a.clone()
    broken[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite values in x0, x2"):
        check_broken([broken, b], [a, b], [a, broken])


def test_all_must_be_of_one_base() -> None:
    a, b = matrices((12, 20), 2)
    own, stranger = vector({"x": a}), vector({"x": b}, "stranger", "another digest")
    for experts, merged in (([own, stranger], None), ([own, own], stranger)):
        with pytest.raises(BaseMismatchError, match="stranger was made for another base"):
            compare_subspaces(experts, merged)


def test_arguments_are_checked() -> None:
    a, b = (vector({"x": m}) for m in matrices((12, 20), 2))
    with pytest.raises(OptionError, match="at least two experts, not 1"):
        compare_subspaces([a])
    with pytest.raises(OptionError, match="`rank` must be at least 1, not 0"):
        compare_subspaces([a, b], rank=0)
    with pytest.raises(OptionError, match=r"`kept` must be in \(0, 1\], not 2"):
        compare_subspaces([a, b], kept=2)
