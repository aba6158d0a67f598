"""What a merge does with tensors that are no weights: running statistics, counters, index buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError
from mergeready.experts.open import Expert
from mergeready.weights.names import match_names
from mergeready.weights.source import WeightSource

Statistics: TypeAlias = Literal["base", "average"]


def check_statistics(how: Statistics) -> Statistics:
    """Where running statistics come from.

    Raises:
        OptionError: If it is unknown.
    """
    if how not in get_args(Statistics):
        raise OptionError(f"`statistics` must be base or average, not {how!r}.")
    return how


def merged_statistic(name: str, base: WeightSource, experts: Sequence[Expert], how: Statistics) -> Tensor:
    """The value of a tensor that is no weight in the merged model.

    Args:
        name: Its name in the base.
        base: The base.
        experts: The experts; adapters have no statistics and do not count.
        how: ``base`` keeps the base's value, right for experts whose BatchNorm was frozen. ``average`` takes the
            mean over experts that have it, a first guess for experts trained with live statistics. Integers
            always stay the base's.

    Raises:
        MismatchError: If an expert's has another shape.
    """
    value = base.read(name)
    if how == "base" or not value.dtype.is_floating_point:
        return value
    read = [_read(name, base, expert.statistics) for expert in experts if expert.statistics is not None]
    found = [tensor.cpu().double() for tensor in read if tensor is not None]
    return torch.stack(found).mean(0).to(value) if found else value


def _read(name: str, base: WeightSource, source: WeightSource) -> Tensor | None:
    own = name
    if name not in source.infos:
        pairs = match_names(
            source.infos, base.infos, aliases=source.aliases, base_aliases=base.aliases
        ).to_base
        own = next((mine for mine, theirs in pairs.items() if theirs == name), "")
    if own not in source.infos:
        return None
    if source.infos[own].shape != base.infos[name].shape:
        shapes = f"{source.infos[own].shape}, in the base {base.infos[name].shape}"
        raise MismatchError(f"{own} of {source.label} is {shapes}.")
    return source.read(own)
