from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.merging.largest import kth_largest, largest


def expected(values: np.ndarray, count: int) -> np.ndarray:
    """A full stable sort by falling value."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


@given(
    seed=st.integers(0, 999),
    size=st.sampled_from([1, 7, 9000, 30000]),
    kind=st.sampled_from(["normal", "grid", "constant", "rows", "rising"]),
    share=st.sampled_from([0.0, 1e-4, 0.1, 0.5, 0.999, 1.0]),
)
def test_equals_a_stable_sort(seed: int, size: int, kind: str, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=size),
        "grid": rng.integers(-2, 3, size),
        "constant": np.zeros(size),
        "rows": rng.normal(size=size) * (np.arange(size) % 7 == 0),
        "rising": np.arange(size) ** 2,
    }[kind].astype(np.float32)
    count = max(1, int(share * size))
    assert np.array_equal(largest(values, count), expected(values, count))
    assert kth_largest(values, count) == np.sort(values)[size - count]


def test_a_sample_that_misleads_in_either_direction() -> None:
    values = np.zeros(2**16, np.float32)
    values[:: len(values) // 2**12 | 1] = 1.0  # all that the sample sees
    for count in (100, 6000, 20000):
        assert np.array_equal(largest(values, count), expected(values, count))
    assert np.array_equal(largest(-values, 100), expected(-values, 100))
    assert kth_largest(-values, 2**16) == -1.0


@pytest.mark.parametrize("size", [5, 20000])
def test_nan_are_never_chosen(size: int) -> None:
    values = np.full(size, np.nan, np.float32)
    values[[1, 3]] = [2.0, 1.0]
    assert largest(values, 4).tolist() == [1, 3]
    assert kth_largest(values, 2) == 1.0
    assert np.isnan(kth_largest(values, 3))
