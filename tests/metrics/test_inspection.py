from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import NonFiniteError
from mergeready.experts import BaseIdentity, Delta, DeltaTaskVector, Dense, LowRank, Rows
from mergeready.metrics.inspection import inspect_vector, stable_rank
from mergeready.weights import StateDictSource
from tests.metrics.chunks import base_of, values


def vector(**deltas: Delta) -> DeltaTaskVector:
    infos = StateDictSource({name: torch.zeros(delta.shape) for name, delta in deltas.items()}).infos
    return DeltaTaskVector(deltas, infos, BaseIdentity({}), "the expert")


@given(seed=st.integers(0, 999), kind=st.sampled_from(["normal", "heavy tails", "sparse"]))
def test_figures(seed: int, kind: str) -> None:
    tensors = {
        "layers.0.attn.weight": values((20, 30), kind, 1.0, seed),
        "layers.1.mlp.weight": values((30, 20), kind, 0.1, seed + 1),
        "layers.1.mlp.bias": values((30,), "normal", 0.1, seed + 2),
    }
    found = inspect_vector(vector(**{name: Dense(t) for name, t in tensors.items()}), base_of(tensors))
    flat = torch.cat([t.reshape(-1).double() for t in tensors.values()])
    base = torch.cat([base_of(tensors).read(name).reshape(-1).double() for name in tensors])
    norms = {name: float(t.double().norm()) for name, t in tensors.items()}
    assert found.norm == pytest.approx(float(flat.norm()), rel=1e-6)
    assert found.relative_norm == pytest.approx(float(flat.norm() / base.norm()), rel=1e-6)
    second = math.hypot(norms["layers.1.mlp.weight"], norms["layers.1.mlp.bias"])
    assert found.groups == pytest.approx(
        {"attention": norms["layers.0.attn.weight"], "mlp": second}, rel=1e-6
    )
    assert found.layers == pytest.approx({0: norms["layers.0.attn.weight"], 1: second}, rel=1e-6)
    assert found.sparsity == pytest.approx(float((flat == 0).double().mean()))
    assert 0.01 <= found.top_mass <= 1
    assert found.rank == 20


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-12, 1.0, 1e6]), rows=st.integers(1, 20))
def test_stable_rank_is_close_to_that_of_the_singular_values(seed: int, scale: float, rows: int) -> None:
    matrix = values((rows, 12), "normal", scale, seed)
    singular = torch.linalg.svdvals(matrix.double())
    exact = float(singular.square().sum() / singular[0].square())
    # Power iteration approaches the spectral norm from below, slowly where two singular values are nearly equal.
    assert exact * (1 - 1e-4) <= stable_rank(matrix) <= exact * 1.3
    if len(singular) == 1 or singular[0] > 1.3 * singular[1]:
        assert stable_rank(matrix) == pytest.approx(exact, rel=1e-4)


def test_ranks_are_those_of_the_form() -> None:
    low = LowRank(torch.randn(9, 2), torch.randn(2, 9), (9, 9))
    few = Rows(torch.tensor([1, 4, 5]), torch.randn(3, 9), (9, 9))
    tensors = {"a": torch.ones(9, 9), "b": torch.ones(9, 9)}
    assert inspect_vector(vector(a=low, b=few), base_of(tensors)).rank == 3
    found = inspect_vector(vector(a=low), base_of(tensors))
    assert found.rank == 2
    assert 1 <= found.stable_rank <= 2.01


def test_nothing_changed() -> None:
    found = inspect_vector(vector(a=Dense(torch.zeros(3, 3))), base_of({"a": torch.ones(3, 3)}))
    assert (found.norm, found.relative_norm, found.sparsity, found.rank) == (0.0, 0.0, 1.0, 0)
    assert math.isnan(found.top_mass)
    assert math.isnan(found.stable_rank)


def test_nan_is_named() -> None:
    bad = torch.ones(3, 3)
    bad[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match="the expert holds NaN or infinite values in a"):
        inspect_vector(vector(a=Dense(bad)), base_of({"a": bad}))
