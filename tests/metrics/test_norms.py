from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.metrics import Chunk, NormAccumulator, group_of
from mergeready.metrics.norms import norm_ratio
from tests.metrics.chunks import Values, base_of, cuts, experts, feed, flat, in_parts, long_experts


def made(found: Sequence[Values], count: int | None = None) -> NormAccumulator:
    return NormAccumulator(list(found[0]), count or len(found))


@given(found=experts())
def test_norms(found: list[Values]) -> None:
    norms = feed(made(found), found)
    base = base_of(found[0])
    base_norm = math.sqrt(sum(float(base.read(name).double().square().sum()) for name in found[0]))
    for expert, row in enumerate(flat(found)):
        exact = float(row.norm())
        assert norms.norm(expert) == pytest.approx(exact, rel=1e-6, abs=0)
        expected = exact / base_norm if base_norm else math.inf
        assert norms.relative_norm(expert) == pytest.approx(expected, rel=1e-6, abs=0)
        for name, value in found[expert].items():
            square = float(value.double().square().sum())
            assert norms.squared(expert)[name] == pytest.approx(square, rel=1e-6, abs=0)


def test_norms_over_several_chunks() -> None:
    found = long_experts()
    norms = feed(made(found), found)
    for expert, row in enumerate(flat(found)):
        assert norms.norm(expert) == pytest.approx(float(row.norm()), rel=1e-6)


@given(found=experts(), cuts=cuts, count=st.integers(1, 4))
def test_parts_add_up(found: list[Values], cuts: list[float], count: int) -> None:
    together = in_parts([made(found) for _ in range(count)], found, cuts)
    whole = feed(made(found), found)
    torch.testing.assert_close(together.sums, whole.sums, rtol=1e-6, atol=0)


def test_only_the_first_experts_count() -> None:
    found = long_experts(3)
    only = feed(made(found, 1), found)
    assert only.norm(0) == feed(made(found), found).norm(0)
    assert only.sums.shape == (1, 2)


def test_norms_by_group() -> None:
    found = [
        {
            "layers.0.self_attn.q_proj.weight": torch.full((4,), 3.0),
            "layers.1.self_attn.q_proj.weight": torch.full((4,), 4.0),
            "layers.0.mlp.up_proj.weight": torch.full((4,), 1.0),
            "head.weight": torch.full((4,), 9.0),
        }
    ]
    norms = feed(made(found), found)
    assert norms.by(group_of, 0) == pytest.approx({"attention": 10.0, "mlp": 2.0, "other": 18.0})
    assert norms.by(lambda name: "all" if "layers" in name else None, 0) == pytest.approx(
        {"all": math.sqrt(104)}
    )


def test_a_zero_base_has_no_relative_norm() -> None:
    norms = NormAccumulator(["x"], 1)
    norms.update(Chunk("x", torch.zeros(3), [torch.ones(3)]))
    assert norms.relative_norm(0) == math.inf


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_norm_ratio(norms: list[float]) -> None:
    ordered = sorted(norms)
    assert norm_ratio(norms) == pytest.approx(ordered[-1] / ordered[0])
    assert norm_ratio([*norms, 0.0]) == math.inf
