from __future__ import annotations

import math

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.svd import thin_svd

KEPT = 0.95
"""Share of a merged matrix's norm that its leading directions must hold."""


def leading_directions(merged: Tensor, kept: float = KEPT) -> Tensor:
    """The fewest left singular vectors that hold a share of a matrix's norm: U_k, (rows, k).

    ``k = min {k : ‖σ₁…σ_k‖ ≥ kept · ‖σ‖}``.

    Args:
        merged: The merged delta of one parameter, (rows, columns); rows are outputs.
        kept: The share of ‖M‖_F, in (0, 1].

    Raises:
        OptionError: If ``kept`` is outside (0, 1].

    Example:
        >>> leading_directions(torch.diag(torch.tensor([3.0, 0.5]))).shape
        torch.Size([2, 1])
    """
    left, values, _ = thin_svd(merged.double())
    return leading_of(left, values, kept)


def leading_of(left: Tensor, values: Tensor, kept: float = KEPT) -> Tensor:
    """The same from left singular vectors and singular values, largest first.

    Raises:
        OptionError: If ``kept`` is outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise OptionError(f"`kept` must be in (0, 1], not {kept}.")
    if not len(values):
        return left
    held = values.square().cumsum(0).sqrt() / values.norm()
    # The last sum may fall short of 1 by rounding.
    count = int((held < kept - 1e-12).sum()) + 1
    return left[:, :count]


def alignment_ratio(delta: Tensor, merged: Tensor, kept: float = KEPT) -> float:
    """Subspace alignment ratio: how much of an expert's change lies in the directions that the merge writes to.

    ``SAR = ‖U_k U_kᵀ τ‖_F / ‖τ‖_F`` with U_k from :func:`leading_directions`. 1 where the merge's outputs can hold
    all that the expert does, near √(k / rows) for a stranger. Independent of the scale of the merge. Marczak et al.,
    "No Task Left Behind" (arXiv 2502.04959), equations 5 and 6; the authors' script keeps one direction less.

    *Evidence*: averaged over layers and tasks, Pearson 0.94 with normalised improvement on eight vision tasks, as its
    authors report; that compares merge methods, with one set of experts. *Cost*: one SVD of the merged matrix and one
    product an expert.

    Args:
        delta: One expert's change of a parameter, (rows, columns).
        merged: The merged change of it.
        kept: See :func:`leading_directions`.

    Returns:
        A number in [0, 1]; NaN where the expert changes nothing.

    Raises:
        OptionError: If ``kept`` is outside (0, 1].

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.1]])
        >>> alignment_ratio(a, a + b), alignment_ratio(b, a + b)
        (1.0, 0.0)
    """
    return share_inside(delta, leading_directions(merged, kept))


def share_inside(delta: Tensor, basis: Tensor) -> float:
    """Share of a change's norm that lies in the span of orthonormal columns; NaN where nothing is changed."""
    size = float(delta.double().norm())
    if not size:
        return math.nan
    return min(float(torch.linalg.matrix_norm(basis.T @ delta.to(basis))) / size, 1.0)
