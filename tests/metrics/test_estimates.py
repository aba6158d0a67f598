"""Estimates against what they estimate, on heavy-tailed task vectors; and whether the stated errors are honest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError
from mergeready.experts import Base, DeltaTaskVector, Dense, LowRank
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.compare import compare_vectors
from mergeready.metrics.estimates import (
    estimate_cosine,
    estimate_overlap,
    estimate_sign_conflict,
)
from mergeready.metrics.take_fingerprint import take_fingerprint

SHAPES = {"embed": (300, 64), "a": (150, 120), "b": (90, 200), "norm": (120,)}


def heavy(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Student's t with three degrees of freedom: as heavy as real task vectors' tails."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn((3, *shape), generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / chi.sqrt()


def base(trial: int = 0, seed: int = 0) -> Base:
    generator = torch.Generator().manual_seed(seed)
    return Base.open(
        {f"{name}{trial}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    )


def vectors(opened: Base, trial: int, mix: float) -> list[DeltaTaskVector]:
    """Two experts with something in common, unequal in norm over parameters."""
    made = []
    for seed in (1, 2):
        deltas = {}
        for i, (name, info) in enumerate(opened.source.infos.items()):
            common = heavy(1000 * trial + i, info.shape)
            own = heavy(1000 * trial + 100 * seed + i, info.shape)
            deltas[name] = Dense((1 + 5 * i * seed) * 1e-3 * (mix * common + (1 - mix) * own))
        made.append(DeltaTaskVector(deltas, opened.source.infos, opened.identity, f"e{seed}"))
    return made


def prints(opened: Base, made: list[DeltaTaskVector], budget: int) -> list[Fingerprint]:
    return [take_fingerprint(vector, opened, budget=budget) for vector in made]


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.8])
def test_stated_errors_are_honest(mix: float) -> None:
    """Over many draws of coordinates (parameter names), truth lies within two errors about 19 times in 20."""
    cosines, signs = [], []
    for trial in range(40):
        opened = base(trial)
        made = vectors(opened, 0, mix) if trial == 0 else vectors(opened, trial, mix)
        exact = compare_vectors(made, opened.source)
        a, b = prints(opened, made, 4000)
        cosine, sign = estimate_cosine(a, b), estimate_sign_conflict(a, b)
        cosines.append((cosine.value - exact.cosine[0][1]) / cosine.error)
        signs.append((sign.value - exact.sign_conflict[0][1]) / sign.error)
    for found in (torch.tensor(cosines), torch.tensor(signs)):
        assert float((found.abs() < 2).float().mean()) > 0.82  # 40 trials of 0.95: below 1 in 1000
        assert abs(float(found.mean())) < 4 / math.sqrt(len(found))
        assert 0.6 < float(found.std()) < 1.6


def test_complete_samples_are_exact_up_to_rounding() -> None:
    opened = base()
    made = vectors(opened, 0, 0.3)
    exact = compare_vectors(made, opened.source)
    a, b = prints(opened, made, 10**9)
    cosine, sign = estimate_cosine(a, b), estimate_sign_conflict(a, b)
    assert (cosine.error, sign.error) == (0.0, 0.0)
    assert cosine.value == pytest.approx(exact.cosine[0][1], abs=2e-3)  # bf16
    assert sign.value == pytest.approx(exact.sign_conflict[0][1], abs=1e-6)


def test_different_budgets_compare_what_both_hold() -> None:
    opened = base()
    made = vectors(opened, 0, 0.5)
    for first, second in ((500, 5000), (500, 10**9), (40_000, 10**9)):
        [a, _], [_, b] = prints(opened, made, first), prints(opened, made, second)
        [_, same] = prints(opened, made, first)
        assert estimate_cosine(a, b).value == pytest.approx(estimate_cosine(a, same).value, abs=1e-6)


def low_rank(opened: Base, seed: int, pick: list[int]) -> Fingerprint:
    """Eight matrices whose right singular vectors are the picked ones of eight orthonormal directions each."""
    deltas = {}
    for i, name in enumerate(opened.source.infos):
        right = torch.linalg.qr(torch.randn(120, 8, generator=torch.Generator().manual_seed(i))).Q.T[pick]
        left = torch.linalg.qr(torch.randn(150, 4, generator=torch.Generator().manual_seed(100 * seed + i))).Q
        deltas[name] = LowRank(left, right.contiguous(), (150, 120))
    return take_fingerprint(DeltaTaskVector(deltas, opened.source.infos, opened.identity, f"e{seed}"), opened)


def test_overlap_of_equal_and_of_orthogonal_subspaces() -> None:
    opened = Base.open({f"layer.{i}": torch.randn(150, 120) for i in range(8)})
    a, same = low_rank(opened, 1, [0, 1, 2, 3]), low_rank(opened, 2, [3, 2, 1, 0])
    half, other = low_rank(opened, 3, [0, 1, 4, 5]), low_rank(opened, 4, [4, 5, 6, 7])
    assert estimate_overlap(a, same) == pytest.approx(1.0, abs=0.07)
    assert estimate_overlap(a, half) == pytest.approx(0.5, abs=0.07)
    assert estimate_overlap(a, other) == pytest.approx(0.0, abs=0.04)


def test_nothing_in_common() -> None:
    opened = base()
    one = DeltaTaskVector({"a0": Dense(heavy(1, SHAPES["a"]))}, opened.source.infos, opened.identity, "one")
    two = DeltaTaskVector({"b0": Dense(heavy(2, SHAPES["b"]))}, opened.source.infos, opened.identity, "two")
    a, b = take_fingerprint(one, opened), take_fingerprint(two, opened)
    assert estimate_cosine(a, b).value == 0.0
    assert math.isnan(estimate_sign_conflict(a, b).value)
    assert math.isnan(estimate_overlap(a, b))


def test_other_bases_are_refused() -> None:
    first, second = base(seed=0), base(seed=9)
    a, *_ = prints(first, vectors(first, 0, 0.3), 1000)
    b, *_ = prints(second, vectors(second, 0, 0.3), 1000)
    for function in (estimate_cosine, estimate_sign_conflict, estimate_overlap):
        with pytest.raises(BaseMismatchError, match="another base"):
            function(a, b)
