"""The papers' matrix methods in float64 numpy, written without looking at the library; and matrices to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.linalg import eigh, norm, svd
from numpy.typing import NDArray
from torch import Tensor

from mergeready.experts import BaseIdentity, DeltaTaskVector, LowRank, TaskVector, dense
from mergeready.experts.delta import Delta, Dense
from mergeready.merging import MergeMethod
from mergeready.merging.parameter import merged_delta
from mergeready.weights.source import TensorInfo

NAME = "layer.weight"
Matrix = NDArray[np.float64]
Formula = Callable[[Sequence[Matrix]], Matrix]

shapes = st.sampled_from([(12, 20), (20, 12), (16, 16), (40, 9), (3, 30), (1, 7), (7, 1)])
factors = st.sampled_from([-1.5, 0.25, 0.5, 1.0, 2.0])


def matrices(shape: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    """Matrices with a falling spectrum that share some directions, as task vectors do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    falling = torch.logspace(0, -1.5, shape[1])
    return [0.01 * falling * (0.4 * shared + torch.randn(shape, generator=generator)) for _ in range(count)]


def adapters(shape: tuple[int, ...], ranks: Sequence[int], seed: int = 0) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    return [
        LowRank(
            0.1 * torch.randn(rows, r, generator=generator),
            0.1 * torch.randn(r, columns, generator=generator),
            shape,
        )
        for r in ranks
    ]


def merged(method: MergeMethod, deltas: Sequence[Delta | Tensor | None], weights: Sequence[float]) -> Tensor:
    """What the library makes of one parameter's deltas."""
    made = [Dense(d) if isinstance(d, Tensor) else d for d in deltas]
    shape = next(d.shape for d in made if d is not None)
    infos = {NAME: TensorInfo(shape, torch.float32)}
    vectors: list[TaskVector] = [
        DeltaTaskVector({} if d is None else {NAME: d}, infos, BaseIdentity({}), f"expert {i}")
        for i, d in enumerate(made)
    ]
    result = merged_delta(method, NAME, infos[NAME], vectors, weights)
    assert result is not None
    assert result.dtype == torch.float32
    assert tuple(result.shape) == shape
    return result


def weighted(deltas: Sequence[Delta | Tensor], weights: Sequence[float]) -> list[Matrix]:
    """The float64 matrices that a formula is about."""
    return [w * matrix_of(d) for d, w in zip(deltas, weights, strict=True)]


def matrix_of(delta: Delta | Tensor) -> Matrix:
    if isinstance(delta, LowRank):
        return (delta.B.double() @ delta.A.double()).numpy()
    value = delta if isinstance(delta, Tensor) else dense(delta)
    return value.double().reshape(value.shape[0], -1).numpy()


def error(ours: Tensor, expected: Matrix) -> float:
    """Relative, in the Frobenius norm."""
    got = ours.double().reshape(expected.shape).numpy()
    return float(norm(got - expected) / max(norm(expected), 1e-300))


def inverse_root(gram: Matrix) -> Matrix:
    values, vectors = eigh(gram)
    return vectors / np.sqrt(values) @ vectors.T


def orthogonalised(X: Matrix) -> Matrix:
    """X (XᵀX)^(-1/2), or (XXᵀ)^(-1/2) X where X is wide."""
    return X @ inverse_root(X.T @ X) if X.shape[0] >= X.shape[1] else inverse_root(X @ X.T) @ X


def tsv_m(changes: Sequence[Matrix]) -> Matrix:
    """Gargiulo et al., algorithm 1, with the whitening form of the Procrustes problem (their proposition)."""
    kept = max(1, min(changes[0].shape) // len(changes))
    U, S, V = zip(*(svd(change, full_matrices=False) for change in changes), strict=True)
    left = orthogonalised(np.hstack([u[:, :kept] for u in U]))
    right = orthogonalised(np.vstack([v[:kept] for v in V]))
    return left @ np.diag(np.concatenate([s[:kept] for s in S])) @ right


def iso_c(changes: Sequence[Matrix]) -> Matrix:
    """Marczak et al., section 4: the polar factor of the sum, times the mean singular value."""
    total = sum(changes)
    return svd(total, compute_uv=False).mean() * orthogonalised(total)


def iso_cts(changes: Sequence[Matrix], common: float = 0.8) -> Matrix:
    """Marczak et al., algorithm 2."""
    r, T = min(changes[0].shape), len(changes)
    s = round((r - int(common * r)) / T)
    k = r - s * T
    U, S, V = (part[..., :k] if i == 0 else part[:k] for i, part in enumerate(svd(sum(changes))))
    specific = [svd(change - U @ U.T @ change) for change in changes]
    left = np.hstack([U, *(u[:, :s] for u, _, _ in specific)])
    right = np.vstack([V, *(v[:s] for _, _, v in specific)])
    mean = np.concatenate([S, *(values[:s] for _, values, _ in specific)]).mean()
    return mean * orthogonalised(left) @ orthogonalised(right)


def wudi(changes: Sequence[Matrix], ridge: float = 0.0) -> Matrix:
    """Cheng et al., equation 10, as one least squares problem in all rows of τ; ρ = ridge · T as more equations."""
    unit = [change / norm(change) for change in changes]
    equations, answers = np.vstack(unit), np.vstack([u @ c.T for u, c in zip(unit, changes, strict=True)])
    rho = np.sqrt(ridge * len(changes))
    if rho:
        equations = np.vstack([equations, rho * np.eye(equations.shape[1])])
        answers = np.vstack([answers, rho * sum(changes).T])
    return np.linalg.lstsq(equations, answers, rcond=1e-5)[0].T


def knots(changes: Sequence[Matrix], inner: Callable[[list[Matrix]], Matrix]) -> Matrix:
    """Stoica et al., section 4: the basis from the eigenvectors of Σ τᵢ τᵢᵀ, which is [τ₁ …][τ₁ …]ᵀ."""
    values, basis = eigh(sum(change @ change.T for change in changes))
    basis = basis[:, values > 1e-12 * values[-1]][:, ::-1]
    return basis @ inner([basis.T @ change for change in changes])


def svc(merged: Matrix, changes: Sequence[Matrix], alpha: float) -> Matrix:
    """Li et al., algorithm 1, a direction at a time."""
    U, S, V = svd(merged, full_matrices=False)
    result = np.zeros_like(merged)
    for u, sigma, v in zip(U.T, S, V, strict=True):
        together = u @ merged
        times = [(together @ (u @ c)) / ((u @ c) @ (u @ c)) for c in changes]
        result += np.outer(u, v) * sigma * len(changes) / sum(max(alpha, s) for s in times)
    return result
