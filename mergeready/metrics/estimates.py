"""Interference estimated from fingerprints, with the error that sampling leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError
from mergeready.experts.coordinates import coordinates
from mergeready.experts.fingerprint import Fingerprint


@dataclass(frozen=True)
class Estimated:
    """An estimate and its standard error; the truth lies within two of them about 19 times in 20."""

    value: float
    error: float


def estimate_cosine(a: Fingerprint, b: Fingerprint) -> Estimated:
    """cos(τₐ, τ_b), by parameter and then together with the exact norms.

    ``⟨τₐ, τ_b⟩ ≈ Σ_p ‖τₐₚ‖ ‖τ_bₚ‖ ĉ_p`` where ĉ_p is the cosine of the samples of parameter p: a ratio estimator, which
    heavy tails hurt less than the plain sum. Its error is by linearisation (Cochran, "Sampling Techniques", 6.4).
    Parameters whose samples are all zero though their norm is not count as uncorrelated, with their full uncertainty.

    Raises:
        BaseMismatchError: If the two are of different bases.
    """
    require_same_base(a, b)
    products, variance = 0.0, 0.0
    for name in _common(a.norms, b.norms):
        weight = a.norms[name] * b.norms[name]
        cosine, error = _sampled_cosine(*_aligned(a, b, name), complete=_is_complete(a, b, name))
        products += weight * cosine
        variance += (weight * error) ** 2
    scale = a.norm * b.norm
    return Estimated(products / scale, math.sqrt(variance) / scale)


def estimate_sign_conflict(a: Fingerprint, b: Fingerprint) -> Estimated:
    """Share of coordinates with opposite signs among those where both changed; NaN where no sample shares one.

    Raises:
        BaseMismatchError: If the two are of different bases.
    """
    require_same_base(a, b)
    rows = []
    for name in _common(a.norms, b.norms):
        x, y = _aligned(a, b, name)
        both = (x != 0) & (y != 0)
        share, conflict = float(both.float().mean()), float((both & (x.sign() != y.sign())).float().mean())
        rows.append((a.numel(name), share, conflict, 0 if _is_complete(a, b, name) else len(x)))
    shared = sum(numel * share for numel, share, _, _ in rows)
    if not shared:
        return Estimated(math.nan, math.nan)
    value = sum(numel * conflict for numel, _, conflict, _ in rows) / shared
    # Residuals of the ratio: conflict − value · both, whose mean square is s (1 − 2v) c + v² b by parameter.
    variance = sum(
        (numel / shared) ** 2
        * max(conflict * (1 - 2 * value) + value**2 * share - (conflict - value * share) ** 2, 0)
        / n
        for numel, share, conflict, n in rows
        if n
    )
    return Estimated(value, math.sqrt(variance))


def estimate_overlap(a: Fingerprint, b: Fingerprint) -> float:
    """Overlap of the leading right singular subspaces, ``‖V_aᵀ V_b‖²_F / k``, averaged over matrices by energy.

    0 for orthogonal subspaces, 1 for equal ones; what the projection adds by chance, k / width, is taken off. NaN where
    the two have no sketched matrix in common.

    Raises:
        BaseMismatchError: If the two are of different bases.
    """
    require_same_base(a, b)
    total, weights = 0.0, 0.0
    for name in _common(a.subspaces, b.subspaces):
        left, right = a.subspaces[name], b.subspaces[name]
        rank, width = left.shape
        chance = rank / width
        overlap = (float((left @ right.T).square().sum()) / rank - chance) / (1 + 1 / width)
        weight = a.norms[name] * b.norms[name]
        total, weights = total + weight * overlap, weights + weight
    return total / weights if weights else math.nan


def require_same_base(a: Fingerprint, b: Fingerprint) -> None:
    """Raise unless two fingerprints are of one base.

    Raises:
        BaseMismatchError: If they are not.
    """
    if a.base.fingerprint == b.base.fingerprint:
        return
    a.base.require_same(b.base, b.label)
    if a.total != b.total:
        raise BaseMismatchError(f"{a.label} and {b.label} are of bases of different sizes.")


def _common(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Names that both have, in a fixed order, so that sums round alike in every run."""
    return [name for name in a if name in b]


def _aligned(a: Fingerprint, b: Fingerprint, name: str) -> tuple[Tensor, Tensor]:
    """The samples that both hold of one parameter."""
    x, y, numel = a.samples[name], b.samples[name], a.numel(name)
    if len(x) == len(y):
        return x, y
    count = min(len(x), len(y))
    # The larger sample begins with the smaller one, unless it holds every coordinate, in order.
    pick = [s[coordinates(name, numel, count)] if len(s) == numel else s[:count] for s in (x, y)]
    return pick[0], pick[1]


def _is_complete(a: Fingerprint, b: Fingerprint, name: str) -> bool:
    return min(len(a.samples[name]), len(b.samples[name])) == a.numel(name)


def _sampled_cosine(x: Tensor, y: Tensor, *, complete: bool) -> tuple[float, float]:
    x, y = x.double(), y.double()
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    if not xx or not yy:
        return 0.0, 1.0
    cosine = xy / math.sqrt(xx * yy)
    if complete:
        return cosine, 0.0
    influence = x * y / math.sqrt(xx * yy) - cosine / 2 * (x * x / xx + y * y / yy)
    return cosine, float(torch.linalg.vector_norm(influence))
