from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Rounded:
    """How one parameter's expert was rounded before its delta could be read.

    Attributes:
        dtype: The format that it is stored in, coarser than fp32.
        of: What is stored in it: the ``weights``, so that a small delta drowns in the spacing of a large weight, or
            only the ``rows`` that changed; or ``factors`` whose product is the delta, so that the error is a share
            of it.
    """

    dtype: torch.dtype
    of: Literal["weights", "rows", "factors"]


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether a format has fewer digits than fp32.

    >>> [is_coarse(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)]
    [True, True, False, False, False]
    """
    return dtype.is_floating_point and torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The one with the fewest digits of those that have fewer than fp32; None where none has.

    >>> coarsest([torch.float16, torch.bfloat16, torch.float32])
    torch.bfloat16
    """
    coarse = [dtype for dtype in dtypes if is_coarse(dtype)]
    return max(coarse, key=lambda dtype: torch.finfo(dtype).eps) if coarse else None
