from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergeready.experts.base import Base
from mergeready.experts.open import Expert
from mergeready.merging.parameter import add_delta, merged_delta, raise_if_broken, require_finite_chunk
from mergeready.merging.repeats import warn_if_repeated
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import (
    KEPT,
    Statistics,
    expert_statistics,
    merged_statistic,
    warn_if_stale,
)
from mergeready.weights.module import module_parameters, plain_name, unwrap
from mergeready.weights.source import is_mergeable


def merge_state(
    base: Base,
    experts: Sequence[Expert],
    settings: MergeSettings,
    *,
    dtype: torch.dtype | None,
    statistics: Statistics,
) -> dict[str, Tensor]:
    """Merge in memory: new tensors under the base's names; tied tensors stay tied.

    Raises:
        NonFiniteError: If the result would hold NaN or infinite values.
    """
    vectors = [expert.vector for expert in experts]
    settings.check(base.source, vectors)
    warn_if_repeated(base, experts)
    warn_if_stale(base.source, expert_statistics(experts), KEPT[statistics])
    state: dict[str, Tensor] = {}
    broken: list[str] = []
    for name, info in base.source.infos.items():
        original = base.source.read(name)
        if not is_mergeable(name, info):
            state[name] = merged_statistic(name, base.source, experts, statistics).clone()
            continue
        setting = settings.at(name)
        delta = merged_delta(setting.method, name, info, vectors, setting.weights)
        out = dtype or info.dtype
        if delta is None:
            state[name] = original.to(out, copy=True)
        else:
            state[name] = add_delta(original, delta, setting.scale, out)
        require_finite_chunk(state[name], name, broken)
    raise_if_broken(broken, vectors)
    for alias, name in base.source.aliases.items():
        state[alias] = state[name]
    return state


def with_state(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of a module that holds other weights, on the same devices."""
    merged = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module_parameters(merged).items():
            parameter.copy_(state[name])
        for name, buffer in unwrap(merged).named_buffers():
            if plain_name(name) in state:  # buffers that no checkpoint holds stay as they are
                buffer.copy_(state[plain_name(name)])
    return merged
