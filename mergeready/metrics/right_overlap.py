from __future__ import annotations

import math

from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.svd import thin_svd

RANK = 8
"""Leading directions that are compared, where nobody says how many."""


def right_overlap(first: Tensor, second: Tensor, rank: int = RANK) -> float:
    """How much two experts read from the same inputs of a layer: ``‖Vₐᵀ V_b‖²_F / k``.

    ``V`` holds the ``k`` leading right singular vectors of each change; where one has fewer, ``k`` is their number. 0
    for experts that read orthogonal inputs, 1 where both read the same, :func:`chance_overlap` for strangers.

    *Evidence*: among the largest positive coefficients of the linear model of 28 pairwise metrics in "Demystifying
    Mergeability" (arXiv 2601.22285); alone it is not reported to predict anything. *Cost*: one SVD an expert and
    matrix, at LoRA's rank for adapters.

    Args:
        first: One expert's change of a parameter, (rows, columns).
        second: The other's.
        rank: How many directions, at least 1.

    Returns:
        A number in [0, 1]; NaN where one of them changes nothing.

    Raises:
        OptionError: If ``rank`` is not positive.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> round(right_overlap(a, b), 3)
        0.5
    """
    if rank < 1:
        raise OptionError(f"`rank` must be at least 1, not {rank}.")
    return overlap_of(*(thin_svd(matrix.double(), rank)[2] for matrix in (first, second)))


def overlap_of(first: Tensor, second: Tensor) -> float:
    """The same from right singular vectors, as rows, largest first; NaN where one has none."""
    rank = min(len(first), len(second))
    if not rank:
        return math.nan
    return float((first[:rank] @ second[:rank].T).square().sum()) / rank


def chance_overlap(columns: int, rank: int = RANK) -> float:
    """The expected overlap of two random subspaces: k / columns.

    >>> chance_overlap(384)
    0.020833333333333332
    """
    return min(rank / columns, 1.0)
