"""What a merge does with tensors that are no weights: running statistics, counters, index buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mergeready.experts.open import Expert
from mergeready.weights.source import WeightSource

Statistics: TypeAlias = Literal["base", "average"]


def merged_statistic(name: str, base: WeightSource, experts: Sequence[Expert], how: Statistics) -> Tensor:
    """The value of a tensor that is no weight in the merged model.

    Args:
        name: Its name in the base.
        base: The base.
        experts: The experts; adapters have no statistics and do not count.
        how: ``base`` keeps the base's value, right for experts whose BatchNorm was frozen. ``average`` takes the
            mean over experts that have it, a first guess for experts trained with live statistics. Integers
            always stay the base's.
    """
    value = base.read(name)
    if how == "base" or not value.dtype.is_floating_point:
        return value
    read = [
        e.statistics.read(name) for e in experts if e.statistics is not None and name in e.statistics.infos
    ]
    if not read:
        return value
    return torch.stack([tensor.double() for tensor in read]).mean(0).to(value.dtype)
