"""A change of weights without what peers are sensitive to: pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SPARE, _ROUNDS = 16, 2  # of a random subspace: directions beyond those that are wanted, and iterations


@dataclass(frozen=True, eq=False)
class Leading:
    """A symmetric matrix without negative eigenvalues, ``U diag(s) Uᵀ + r (I − U Uᵀ)``.

    Attributes:
        vectors: U, orthonormal, (side, k).
        values: s, (k,).
        rest: r, one eigenvalue for all other directions.
    """

    vectors: Tensor
    values: Tensor
    rest: float


def leading(matrix: Tensor, count: int) -> Leading:
    """Leading eigenvectors, and the mean of the other eigenvalues, which keeps the trace.

    Exact where the matrix has at most ``count + 16`` rows; otherwise seen in so many directions, found by subspace
    iteration from random ones that are the same for every matrix of a size (Halko, Martinsson and Tropp, arXiv
    0909.4061).

    Args:
        matrix: Symmetric, without negative eigenvalues, (side, side), fp32 or finer.
        count: How many eigenvectors at most, at least 1.

    Example:
        >>> found = leading(torch.diag(torch.tensor([5.0, 1.0, 3.0])), 1)
        >>> found.vectors.abs().T, found.values, found.rest
        (tensor([[1., 0., 0.]]), tensor([5.]), 2.0)
    """
    side, width = len(matrix), count + _SPARE
    basis = None
    if width < side:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(side, width, generator=generator).to(matrix.device, matrix.dtype)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix @ basis).Q
    seen = matrix if basis is None else basis.T @ (matrix @ basis)
    values, vectors = torch.linalg.eigh((seen + seen.T) / 2)
    values, vectors = values[-count:].clamp(min=0), vectors[:, -count:]
    rest = max(float(matrix.trace() - values.sum()), 0.0) / max(side - len(values), 1)
    return Leading(vectors if basis is None else basis @ vectors, values, rest)


def filtering(change: Tensor, outputs: Leading, inputs: Leading, strength: float) -> Tensor:
    """``E − D`` with ``E = argmin of ‖E − D‖² + c tr(B E A Eᵀ)``, which is ``(I + c B ⊗ A)⁻¹ D``.

    In the eigenvectors of B and A, an entry of D is divided by ``1 + c s t``, s and t the eigenvalues: directions that
    predictions on the factors' data do not depend on stay as they are. Stable for any c, as a step along the gradient
    ``2 B D A`` is not.

    *Cost*: thin products, ``8 · outputs · columns · k`` operations.

    Args:
        change: D, (outputs, columns).
        outputs: B.
        inputs: A.
        strength: c, at least 0.

    Returns:
        A new tensor; what has to be added to D.

    Example:
        >>> two, one = leading(2 * torch.eye(1), 1), leading(torch.eye(2), 1)
        >>> filtering(torch.tensor([[3.0, 6.0]]), two, one, 0.5)
        tensor([[-1.5000, -3.0000]])
    """
    U, V = outputs.vectors, inputs.vectors
    s, t = outputs.values[:, None], inputs.values
    r, q = outputs.rest, inputs.rest
    # What is kept of pairs of leading directions, of a leading one and any other, and of all others.
    both, left, right, rest = (
        1 / (1 + strength * s * t),
        1 / (1 + strength * s * q),
        1 / (1 + strength * r * t),
        1 / (1 + strength * r * q),
    )
    rows, columns = U.T @ change, change @ V
    of_rows = (left - rest) * rows + ((both - left - right + rest) * (rows @ V)) @ V.T
    # One product for both sides, since passes over D take as long as the products.
    joined = torch.cat([U, (right - rest) * columns], dim=1), torch.cat([of_rows, V.T])
    return torch.addmm(change, *joined, beta=rest - 1)
