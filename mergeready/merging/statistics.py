"""What a merge does with tensors that are no weights: running statistics, counters, index buffers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError, listing
from mergeready.experts.open import Expert
from mergeready.weights.names import match_names
from mergeready.weights.source import WeightSource

logger = logging.getLogger("mergeready")

Statistics: TypeAlias = Literal["base", "average"]

StatisticsOf: TypeAlias = Sequence[tuple[str, WeightSource | None]]

_RUNNING = (".running_mean", ".running_var")


def check_statistics(how: Statistics) -> Statistics:
    """Where running statistics come from.

    Raises:
        OptionError: If it is unknown.
    """
    if how not in get_args(Statistics):
        raise OptionError(f"`statistics` must be base or average, not {how!r}.")
    return how


KEPT = {"base": "the base's", "average": "the experts' average, which no data gave"}
"""What a merge's statistics are, in words."""


def merged_statistic(name: str, base: WeightSource, experts: Sequence[Expert], how: Statistics) -> Tensor:
    """The value of a tensor that is no weight in the merged model.

    Args:
        name: Its name in the base.
        base: The base.
        experts: The experts; those without statistics, as most adapters, do not count.
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


def live_layers(base: WeightSource, expert: WeightSource) -> tuple[str, ...]:
    """The layers whose running statistics moved while an expert was trained, by their names in the base.

    An expert that was trained with frozen BatchNorm has exactly the base's statistics, up to its own dtype. One
    that was trained with live statistics has others in every layer that saw data.

    Example:
        >>> from mergeready.weights import StateDictSource
        >>> base = {"norm.running_mean": torch.zeros(2), "norm.running_var": torch.ones(2)}
        >>> expert = base | {"norm.running_mean": torch.tensor([0.0, 0.1])}
        >>> live_layers(StateDictSource(base), StateDictSource(expert))
        ('norm',)
    """
    layers: dict[str, None] = {}
    for name in base.infos:
        if name.endswith(_RUNNING):
            layer, _, _ = name.rpartition(".")
            own = None if layer in layers else _read(name, base, expert)
            if own is not None and not torch.equal(own.cpu(), base.read(name).to("cpu", own.dtype)):
                layers[layer] = None
    return tuple(layers)


def live_experts(base: WeightSource, statistics: StatisticsOf) -> list[tuple[str, tuple[str, ...]]]:
    """The experts that were trained with live statistics: their labels, and the layers concerned.

    Args:
        base: The base.
        statistics: Experts' labels, with the source of their running statistics or None where they have none.
    """
    found = [(label, live_layers(base, source)) for label, source in statistics if source is not None]
    return [(label, layers) for label, layers in found if layers]


def warn_if_stale(base: WeightSource, statistics: StatisticsOf, kept: str) -> None:
    """Warn, once for each set of experts, if a merge's running statistics belong to no data that it will see.

    Args:
        base: The base.
        statistics: See :func:`live_experts`.
        kept: Whose statistics the merged model has, for the message.
    """
    live = live_experts(base, statistics)
    if live:
        layers = len({layer for _, found in live for layer in found})
        _warn_once(
            f"{len(live)} of {len(statistics)} experts ({listing(dict.fromkeys(label for label, _ in live))}) were "
            f"trained with live BatchNorm statistics in {layers} layers, while the merged model has {kept}. Evaluated "
            "like this it looks worse than it is: recompute them first, with mergeready.recalibrate."
        )


def expert_statistics(experts: Sequence[Expert]) -> StatisticsOf:
    """Experts' labels, with the source of their running statistics."""
    return [(expert.label, expert.statistics) for expert in experts]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _read(name: str, base: WeightSource, source: WeightSource) -> Tensor | None:
    own = name
    if name not in source.infos:
        pairs = match_names(
            source.infos,
            base.infos,
            aliases=source.other_names,
            base_aliases=base.other_names,
        ).to_base
        own = next((mine for mine, theirs in pairs.items() if theirs == name), "")
    if own not in source.infos:
        return None
    if source.infos[own].shape != base.infos[name].shape:
        shapes = f"{source.infos[own].shape}, in the base {base.infos[name].shape}"
        raise MismatchError(f"{own} of {source.label} is {shapes}.")
    return source.read(own)
