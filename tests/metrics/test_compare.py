from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from mergeready.errors import OptionError
from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense
from mergeready.metrics import chance_conflict
from mergeready.metrics.compare import compare_vectors
from mergeready.weights import StateDictSource
from tests.metrics.chunks import Values, base_of, experts, flat, long_experts, task_vectors
from tests.metrics.test_gram import exact_cosines
from tests.metrics.test_sign_conflict import exact_pairs, exact_together


def check(found: list[Values]) -> None:
    comparison = compare_vectors(task_vectors(found), base_of(found[0]))
    norms = flat(found).norm(dim=1)
    assert comparison.labels == [f"expert {i}" for i in range(len(found))]
    assert comparison.norms == pytest.approx(norms.tolist(), rel=1e-6, abs=0)
    np.testing.assert_allclose(comparison.cosine, exact_cosines(found).numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(comparison.sign_conflict, exact_pairs(found), rtol=0, atol=1e-12)
    together, normalised = exact_together(found)
    assert comparison.conflict_of_all == pytest.approx(together, rel=1e-6, abs=1e-9, nan_ok=True)
    assert comparison.conflict_normalised == pytest.approx(normalised, rel=1e-6, abs=1e-9, nan_ok=True)
    ratio = float(norms.max() / norms.min()) if norms.min() > 0 else math.inf
    assert comparison.norm_ratio == pytest.approx(ratio, rel=1e-6)
    assert comparison.chance == chance_conflict(len(found))


@given(found=experts().filter(lambda found: len(found) > 1))
def test_all_figures(found: list[Values]) -> None:
    check(found)


def test_all_figures_over_several_chunks() -> None:
    check(long_experts())


def test_experts_may_change_different_parameters() -> None:
    base = StateDictSource({"x": torch.ones(4), "y": torch.ones(4), "z": torch.ones(4)})

    def vector(**values: float) -> DeltaTaskVector:
        deltas = {name: Dense(torch.full((4,), value)) for name, value in values.items()}
        return DeltaTaskVector(deltas, base.infos, BaseIdentity({}), "an expert")

    comparison = compare_vectors([vector(x=1.0, y=1.0), vector(x=-1.0), vector(y=3.0)], base)
    assert comparison.norms == pytest.approx([8**0.5, 2.0, 6.0])
    assert comparison.relative_norms == pytest.approx([1.0, 0.5**0.5, 4.5**0.5])  # over x and y, not z
    assert comparison.cosine[0] == pytest.approx([1.0, -(0.5**0.5), 0.5**0.5])
    assert comparison.sign_conflict[0] == [0.0, 1.0, 0.0]
    assert math.isnan(comparison.sign_conflict[1][2])


def test_two_are_needed() -> None:
    with pytest.raises(OptionError, match="at least two experts, not 1"):
        compare_vectors(task_vectors(long_experts(1)), base_of(long_experts(1)[0]))
