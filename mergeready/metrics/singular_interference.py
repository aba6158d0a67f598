from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.svd import thin_svd

Triples = tuple[Tensor, Tensor, Tensor]
"""U (rows, k), σ (k,) and Vᵀ (k, columns), largest first."""


def singular_interference(deltas: Sequence[Tensor], rank: int | None = None) -> float:
    """Singular task interference of experts on one parameter: ``‖(UᵀU − I) Σ (VᵀV − I)‖₁``.

    ``U = [U₁ … U_T]`` and ``V = [V₁ … V_T]`` hold the experts' singular vectors beside each other, Σ all their
    singular values; ‖·‖₁ is the sum of absolute values of all entries. 0 where no two experts share a direction on
    *both* sides of a common singular value. In the unit of the deltas: see :func:`relative_interference`. Gargiulo et
    al., "Task Singular Vectors" (arXiv 2412.00081), section 4.

    *Evidence*: the paper shows it layer by layer and builds TSV-M on it; no published correlation with merged
    quality. *Cost*: one SVD an expert and matrix, at LoRA's rank for adapters, and products of side T · k.

    Args:
        deltas: Each expert's change of the parameter, (rows, columns).
        rank: Directions of each expert; by default what TSV-M keeps, the shorter side over the number of experts.

    Raises:
        OptionError: If there are no experts, or ``rank`` is not positive.

    Example:
        >>> a, b = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> singular_interference([a, b]), singular_interference([a, a])
        (0.0, 4.0)
    """
    return interference_of(_triples(deltas, rank))


def relative_interference(deltas: Sequence[Tensor], rank: int | None = None) -> float:
    """The same over the sum of the singular values that take part: independent of the deltas' size.

    1 where an expert is given twice. NaN where nothing is changed. Not bounded: every pair of directions adds its small
    overlap, so strangers with hundreds of directions each come out far above 1. Compare only values of one rank and
    shape; few leading directions (``rank``) tell strangers from relatives.

    Raises:
        OptionError: As :func:`singular_interference`.

    Example:
        >>> relative_interference([torch.eye(2), 3 * torch.eye(2)], rank=2)
        1.0
    """
    triples = _triples(deltas, rank)
    size = sum(float(values.sum()) for _, values, _ in triples)
    return interference_of(triples) / size if size else math.nan


def interference_of(triples: Sequence[Triples]) -> float:
    """Interference from singular triples of each expert."""
    left = torch.cat([U for U, _, _ in triples], dim=1)
    values = torch.cat([values for _, values, _ in triples])
    right = torch.cat([V for _, _, V in triples], dim=0)
    unit = torch.eye(len(values), dtype=values.dtype, device=values.device)
    product = ((left.T @ left - unit) * values) @ (right @ right.T - unit)
    # Each expert's own vectors are orthogonal up to rounding, and rounding is no interference.
    product = torch.where(product.abs() <= 1e-12 * values.max(), 0.0, product) if len(values) else product
    return float(product.abs().sum())


def kept_directions(shape: tuple[int, int], experts: int) -> int:
    """What TSV-M keeps of each expert: the shorter side over the number of experts, at least 1."""
    return max(1, min(shape) // experts)


def _triples(deltas: Sequence[Tensor], rank: int | None) -> list[Triples]:
    if not deltas:
        raise OptionError("interference needs at least one expert.")
    if rank is not None and rank < 1:
        raise OptionError(f"`rank` must be at least 1, not {rank}.")
    rows, columns = deltas[0].shape
    kept = kept_directions((rows, columns), len(deltas)) if rank is None else rank
    return [thin_svd(delta.double(), kept) for delta in deltas]
