from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.weights.ranks import Ranks


def require_same(ranks: Ranks, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless every rank has the same tensors: what each adds to its own gradients has to be one thing.

    Raises:
        OptionError: If they differ.
    """
    if ranks.size == 1:
        return
    digest = hashlib.blake2b()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if len(set(ranks.each(digest.hexdigest()))) > 1:
        raise OptionError(f"{what} differ from rank to rank: give every rank the same.")
