"""The papers' formulas in float64, written without looking at the library; and inputs to compare on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense, TaskVector
from mergeready.merging import MergeMethod
from mergeready.merging.parameter import merged_delta
from mergeready.weights.source import TensorInfo

NAME = "layer.weight"

weights = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5])


@st.composite
def grids(draw: st.DrawFn, most: int = 5) -> list[Tensor]:
    """Deltas on a coarse grid: ties, zeros and exact cancellation occur, and fp32 sums have no error.

    Where a sum is exact, its sign is too, and election can be compared coordinate by coordinate.
    """
    count, numel = draw(st.integers(1, most)), draw(st.integers(1, 60))
    scale = draw(st.sampled_from([2.0**-40, 2.0**-10, 1.0, 2.0**20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    size = draw(st.sampled_from([2, 100]))
    return [
        scale * torch.randint(-size, size + 1, (numel,), generator=generator).float() for _ in range(count)
    ]


def several_chunks(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(-(2**15), 2**15, (300, 2000), generator=generator).float() / 2**20 for _ in range(count)
    ]


def vectors(deltas: Sequence[Tensor | None]) -> list[TaskVector]:
    shape = next(tuple(delta.shape) for delta in deltas if delta is not None)
    infos = {NAME: TensorInfo(shape, torch.float32)}
    return [
        DeltaTaskVector({} if d is None else {NAME: Dense(d)}, infos, BaseIdentity({}), f"expert {i}")
        for i, d in enumerate(deltas)
    ]


def merged(method: MergeMethod, deltas: Sequence[Tensor | None], factors: Sequence[float]) -> Tensor:
    """What the library makes of one parameter's deltas."""
    made = vectors(deltas)
    info = next(vector.infos[NAME] for vector in made if NAME in vector)
    result = merged_delta(method, NAME, info, made, factors)
    assert result is not None
    assert result.dtype == torch.float32
    assert tuple(result.shape) == info.shape
    return result


def close(ours: Tensor, exact: Tensor, deltas: Sequence[Tensor], factors: Sequence[float]) -> None:
    size = max(float(d.abs().max()) * max(abs(w), 1) for d, w in zip(deltas, factors, strict=True))
    torch.testing.assert_close(ours.double(), exact.reshape(ours.shape), rtol=1e-5, atol=1e-6 * size)


def sum_of(deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Ilharco et al., section 2: τ = Σ wᵢ τᵢ."""
    return sum(w * d.double() for d, w in zip(deltas, factors, strict=True))


def mean_of(deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Wortsman et al., a weighted soup seen from the base: Σ wᵢ τᵢ / Σ wᵢ."""
    total = math.fsum(factors)
    return sum_of(deltas, factors) / total if total else torch.zeros_like(deltas[0]).double()


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Yadav et al., algorithm 1, step 1: keep the top share by magnitude, the first among equals."""
    flat = delta.double().reshape(-1)
    keep = max(1, math.floor(density * len(flat) + 1e-9))
    ranked = torch.from_numpy(np.argsort(-flat.abs().numpy(), kind="stable"))
    result = torch.zeros_like(flat)
    result[ranked[:keep]] = flat[ranked[:keep]]
    return result.reshape(delta.shape)


def elected(deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Steps 2 and 3: γ = sign(Σ wᵢ τ̂ᵢ); the mean of what has that sign, weighted by |wᵢ|."""
    stacked = torch.stack([w * d.double() for d, w in zip(deltas, factors, strict=True)])
    sign = torch.sign(stacked.sum(0))
    agrees = (torch.sign(stacked) == sign) & (stacked != 0)
    importance = torch.tensor([abs(w) for w in factors], dtype=torch.float64)
    importance = importance.reshape(-1, *[1] * (stacked.ndim - 1))
    total = (importance * agrees).sum(0)
    return torch.where(total > 0, (stacked * agrees).sum(0) / total.clamp(min=1e-300), 0.0)


def golden(method: str) -> dict[str, Tensor]:
    """What another implementation made of the same inputs; goldens/README.md says which and how."""
    return load_file(Path(__file__).parent / "goldens" / f"{method}.safetensors")


def golden_deltas(stored: dict[str, Tensor]) -> list[Tensor]:
    """The inputs of a golden: stored as ``delta.0``, ``delta.1`` …"""
    return [stored[key] for key in sorted(stored) if key.startswith("delta.")]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    difference = ours.double().reshape(-1) - theirs.double().reshape(-1)
    return float(difference.norm() / theirs.double().norm())
