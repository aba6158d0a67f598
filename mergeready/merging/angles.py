from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergeready.experts.sums import inner_products
from mergeready.weights.source import TensorInfo, chunk_ranges


def cosines(read: Callable[[int, int], list[Tensor]], info: TensorInfo, count: int) -> Tensor:
    """The cosine of each two experts' deltas of one parameter, float64.

    Args:
        read: Gives elements ``start`` to ``stop`` of every expert's delta, fp32.
        info: The parameter's shape.
        count: Number of experts.

    Returns:
        Shape (experts, experts); NaN where one of the two is all zeros, so that there is no angle.

    Example:
        >>> deltas = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), torch.zeros(2)]
        >>> cosines(lambda a, b: [d[a:b] for d in deltas], TensorInfo((2,), torch.float32), 3)[0]
        tensor([1.0000, 0.6000,    nan], dtype=torch.float64)
    """
    products = torch.zeros(count, count, dtype=torch.float64)
    for start, stop in chunk_ranges(info):
        stacked = torch.stack(read(start, stop))
        products += inner_products(stacked, stacked)
    lengths = products.diagonal().sqrt()
    return (products / lengths[:, None] / lengths[None, :]).clamp(-1, 1)
