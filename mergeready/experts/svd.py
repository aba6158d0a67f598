"""Decompositions in float64 that do not see what rounding left in place of zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ZERO = 1e-6
"""Singular values below this share of the largest count as zero: what fp32 leaves of a matrix of lower rank.

Their singular vectors are arbitrary, so results must not depend on them.
"""

WHOLE = 512
"""Rows or columns, whichever are fewer, up to which ``leading_svd`` decomposes the whole matrix."""

_SPARE, _ROUNDS = 16, 4  # of a random subspace: directions beyond those that are wanted, and iterations

_SQUARED = 1e-9  # of the largest eigenvalue of MᵀM: the smallest that is known well enough

_CANCELLED = 1e-12  # of the norms of what was added: rounding in float64


def thin_svd(
    matrix: Tensor, most: int | None = None, unit: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples that are not zero, largest first: U (rows, k), σ (k,), Vᵀ (k, columns).

    From the eigenvectors of ``matrixᵀ matrix``, in half the time of a singular value decomposition, where what squaring
    loses does not matter: some 1e-15 of the largest eigenvalue are rounding, at most 1e-6 of the smallest wanted one.
    Otherwise by that decomposition; long matrices are first reduced to a triangle then, which costs a fraction.

    Args:
        matrix: Any float64 matrix.
        most: How many triples at most.
        unit: What ``ZERO`` is a share of; the largest singular value by default.
    """
    rows, columns = matrix.shape
    if rows < columns:
        right, values, left = thin_svd(matrix.T.contiguous(), most, unit)
        return left.T, values, right.T
    wanted = columns if most is None else min(most, columns)
    full, values, right = _by_squares(matrix, wanted) or _by_triangle(matrix)
    count = min(wanted, int((values > ZERO * (values[0] if unit is None else unit)).sum()))
    left = matrix @ (right[:count].T / values[:count]) if full is None else full[:, :count]
    return left, values[:count], right[:count]


def _by_squares(matrix: Tensor, wanted: int) -> tuple[None, Tensor, Tensor] | None:
    """The leading singular values and right vectors, in place of the left ones None; None if they are not sure."""
    if not wanted:
        return None
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    squares, vectors = squares[-wanted:].flip(0), vectors[:, -wanted:].flip(1)
    if not float(squares[-1]) > _SQUARED * float(squares[0]):
        return None
    return None, squares.sqrt(), vectors.T


def _by_triangle(matrix: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """All singular triples; of a matrix with more rows than columns, None in place of the left vectors."""
    if matrix.shape[0] == matrix.shape[1]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    _, values, right = torch.linalg.svd(torch.linalg.qr(matrix, mode="r").R, full_matrices=False)
    return None, values, right


def leading_svd(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triples, as ``thin_svd`` gives them; estimates where the matrix is large.

    Matrices of more than ``WHOLE`` rows and columns are seen in ``count + 16`` directions, found by four rounds of
    subspace iteration from random ones: Halko, Martinsson and Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1). Singular
    values are then never too large, and those near the end of a flat spectrum are too small. *Cost*: ten products of
    the matrix with those directions.

    Args:
        matrix: Any float64 matrix.
        count: How many triples at most.

    Example:
        >>> large = torch.diag(100 * 0.9 ** torch.arange(600, dtype=torch.float64))
        >>> leading_svd(large, 2)[1].round()
        tensor([100.,  90.], dtype=torch.float64)
    """
    width = count + _SPARE
    if min(matrix.shape) <= max(WHOLE, width):
        return thin_svd(matrix, count)
    start = torch.randn(
        matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype
    )
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = thin_svd(basis.T @ matrix, count)
    return basis @ left, values, right


def polar(matrix: Tensor) -> Tensor:
    """The nearest partial isometry U Vᵀ, from ``matrix = U Σ Vᵀ`` without its zero singular values.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)).abs()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    left, _, right = thin_svd(matrix)
    return left @ right


def total(changes: Iterable[Tensor]) -> Tensor:
    """Their sum; exactly zero where they cancel but for rounding, so that noise has no directions."""
    size, result = 0.0, None
    for change in changes:
        size += float(change.norm())
        result = change if result is None else result.add_(change)
    if result is None:
        raise ValueError("there is nothing to add")
    return result.zero_() if float(result.norm()) <= _CANCELLED * size else result
