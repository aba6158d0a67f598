"""Estimates from a stratified sample: against residuals written out one by one, and against the truth many times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergeready.metrics.sampled import AgainstPeers, Strata

NUMELS, COUNTS = [50, 4000, 900, 1], [50, 300, 64, 1]


def drawn(numels: list[int], counts: list[int], seed: int) -> list[NDArray[np.int64]]:
    """Places of each parameter, with replacement unless all of it is wanted."""
    rng = np.random.default_rng(seed)
    return [
        np.arange(n) if count == n else rng.integers(0, n, count)
        for n, count in zip(numels, counts, strict=True)
    ]


def vectors(kind: str, numels: list[int], seed: int) -> list[NDArray[np.float64]]:
    """Three task vectors, of parameters whose sizes differ; the second is like the first."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(3):
        parts = [10.0**-i * rng.standard_normal(n) for i, n in enumerate(numels)]
        if kind == "heavy":
            parts = [part * np.exp(rng.standard_normal(len(part))) for part in parts]
        if kind == "sparse":
            parts = [part * (rng.random(len(part)) < 0.3) for part in parts]
        if k == 1:
            parts = [0.7 * part + old for part, old in zip(parts, found[0], strict=True)]
        found.append(parts)
    return found  # type: ignore[return-value]


def slow(x: list[Any], y: list[Any], numels: list[int]) -> dict[str, tuple[float, float]]:
    """Value and error of each figure, from samples by parameter: Cochran's formulas, residual by residual."""

    def total(values: list[Any]) -> tuple[float, float]:
        value, variance = 0.0, 0.0
        for part, n in zip(values, numels, strict=True):
            value += n * float(np.mean(part))
            if len(part) < n:
                variance += n**2 * float(np.var(part, ddof=1)) / len(part)
        return value, variance

    xx, xy, yy = (total([a * b for a, b in zip(p, q, strict=True)])[0] for p, q in ((x, x), (x, y), (y, y)))
    _, variance = total([a * a for a in x])
    found = {"norm": (math.sqrt(xx), math.sqrt(variance) / (2 * math.sqrt(xx)))}
    cosine = xy / math.sqrt(xx * yy)
    residuals = [
        a * b / math.sqrt(xx * yy) - cosine / 2 * (a * a / xx + b * b / yy) for a, b in zip(x, y, strict=True)
    ]
    found["cosine"] = cosine, math.sqrt(total(residuals)[1])
    both = [((a != 0) & (b != 0)).astype(float) for a, b in zip(x, y, strict=True)]
    odd = [(a * b < 0).astype(float) for a, b in zip(x, y, strict=True)]
    shared = total(both)[0]
    conflict = total(odd)[0] / shared
    rest = [c - conflict * b for c, b in zip(odd, both, strict=True)]
    found["conflict"] = conflict, math.sqrt(total(rest)[1]) / shared
    return found


def fast(x: list[Any], others: list[list[Any]], numels: list[int]) -> list[dict[str, tuple[float, float]]]:
    strata = Strata(numels, [len(part) for part in x])
    against = AgainstPeers(strata, np.stack([np.concatenate(y) for y in others]))
    flat = np.concatenate(x)
    norm = strata.norm(flat)
    pairs = zip(against.cosines(flat), against.sign_conflicts(flat), strict=True)
    return [
        {
            "norm": (norm.value, norm.error),
            "cosine": (cosine.value, cosine.error),
            "conflict": (conflict.value, conflict.error),
        }
        for cosine, conflict in pairs
    ]


@given(kind=st.sampled_from(["normal", "heavy", "sparse"]), seed=st.integers(0, 99))
def test_values_and_errors_are_those_of_the_formulas(kind: str, seed: int) -> None:
    places = drawn(NUMELS, COUNTS, seed)
    x, *others = [
        [part[chosen] for part, chosen in zip(parts, places, strict=True)]
        for parts in vectors(kind, NUMELS, seed + 1000)
    ]
    for found, y in zip(fast(x, others, NUMELS), others, strict=True):
        for name, (value, error) in slow(x, y, NUMELS).items():
            assert found[name][0] == pytest.approx(value, rel=1e-9), name
            assert found[name][1] == pytest.approx(error, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse"])
def test_the_truth_is_as_far_away_as_the_errors_say(kind: str) -> None:
    """But for the norm of one whose largest entries a sample misses: nothing in the sample tells of them."""
    whole = vectors(kind, NUMELS, 7)
    truth = slow(whole[0], whole[1], NUMELS)
    offs: dict[str, list[float]] = {name: [] for name in truth}
    for seed in range(300):
        places = drawn(NUMELS, COUNTS, seed)
        x, y, _ = [[part[chosen] for part, chosen in zip(parts, places, strict=True)] for parts in whole]
        [found] = fast(x, [y], NUMELS)
        for name, (value, error) in found.items():
            offs[name].append((value - truth[name][0]) / error)
    if kind == "heavy":
        del offs["norm"]
    for name, values in offs.items():
        assert 0.85 < np.std(values) < 1.3, name
        assert abs(np.mean(values)) < 0.3, name


def test_a_sample_of_everything_is_exact() -> None:
    x, y, _ = vectors("normal", NUMELS, 1)
    [found] = fast(x, [y], NUMELS)
    for name, (value, _) in slow(x, y, NUMELS).items():
        assert found[name] == (pytest.approx(value, rel=1e-9), 0.0)


def test_one_that_equals_the_peer_or_its_opposite_has_no_error() -> None:
    x = [part[:40] for part in vectors("normal", [100, 100], 1)[0]]
    same, opposite = fast(x, [x, [-part for part in x]], [100, 100])
    assert same["cosine"] == (pytest.approx(1), pytest.approx(0, abs=1e-7))
    assert opposite["cosine"] == (pytest.approx(-1), pytest.approx(0, abs=1e-7))
    assert (same["conflict"], opposite["conflict"]) == ((0.0, 0.0), (1.0, 0.0))


def test_nothing_changed_has_no_direction() -> None:
    x, zero = [np.ones(3)], [np.zeros(3)]
    for found in (*fast(zero, [x], [9]), *fast(x, [zero], [9])):
        assert all(math.isnan(number) for name in ("cosine", "conflict") for number in found[name])
    assert Strata([9], [3]).norm(zero[0]).value == 0
