from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """⟨aᵢ, bⱼ⟩ of the rows of two fp32 matrices, in float64 on the CPU, accurate to 1e-6 of ‖aᵢ‖ ‖bⱼ‖.

    A long fp32 sum loses digits (2e-5 over 2¹⁸ heavy-tailed values), so at most 1024 products are summed in fp32.

    >>> inner_products(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[11.,  2.]], dtype=torch.float64)
    """
    whole = first.shape[1] // _BLOCK * _BLOCK
    total = (first[:, whole:] @ second[:, whole:].T).cpu().double()
    if whole:
        a, b = (m[:, :whole].reshape(len(m), -1, _BLOCK).transpose(0, 1) for m in (first, second))
        total += torch.bmm(a, b.transpose(1, 2)).cpu().double().sum(0)
    return total


def squared_norm(values: Tensor) -> float:
    """‖x‖² of a 1-D fp32 tensor, accurate to 1e-6."""
    return float(inner_products(values[None], values[None]))
