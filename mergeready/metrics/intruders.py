from __future__ import annotations

from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.svd import WHOLE, leading_svd

TOP = 10
"""Leading directions of the fine-tuned matrix that are looked at."""

COSINE = 0.5
"""Similarity below which a direction is none of the base's."""

_AMONG = 64


def intruders(before: Tensor, after: Tensor, top: int = TOP, cosine: float = COSINE) -> int:
    """Leading directions of a fine-tuned matrix that its base does not have: intruder dimensions.

    Counts the ``i < top`` with ``max_j |u_i · v_j| < cosine``, where ``u`` are the left singular vectors of the
    fine-tuned matrix and ``v`` those of the base's. Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of
    Equivalence" (arXiv 2410.21228). In matrices of more than 512 rows and columns, ``v`` are the base's 64 leading
    vectors, so that a direction which the base has, but hardly uses, counts as well.

    *Evidence*: their authors find them in LoRA and hardly in full fine-tuning, and more forgetting with more of them;
    what they do to merges is open. *Cost*: two SVDs, in large matrices of ten products with 80 and 26 directions.

    Args:
        before: The base's matrix, (rows, columns), as it is stored.
        after: The fine-tuned one.
        top: How many directions to look at, at least 1.
        cosine: The similarity, in (0, 1].

    Returns:
        A number from 0 to ``top``.

    Raises:
        OptionError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> base = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> strange = torch.zeros(4, 4)
        >>> strange[3, 0] = 9.0
        >>> intruders(base, base * 1.1), intruders(base[:, :3], (base + strange)[:, :3])
        (0, 1)
    """
    if top < 1:
        raise OptionError(f"`top` must be at least 1, not {top}.")
    if not 0 < cosine <= 1:
        raise OptionError(f"`cosine` must be in (0, 1], not {cosine}.")
    smaller = min(before.shape)
    known = leading_svd(before.double(), smaller if smaller <= WHOLE else _AMONG)[0]
    found = leading_svd(after.double(), top)[0]
    if not known.shape[1]:
        return found.shape[1]
    return int(((found.T @ known).abs().amax(1) < cosine).sum())
