"""What adapters become when merged, parameter by parameter: factors where they had factors, whole values elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mergeready.errors import UnsupportedError, listing
from mergeready.experts.adapter import AdapterTaskVector, SlotKind
from mergeready.experts.base import Base
from mergeready.experts.delta import LowRank, Rows
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.adapters.compress import (
    Compressed,
    Rank,
    concatenated,
    factorized,
    truncated,
)
from mergeready.merging.average import Average
from mergeready.merging.method import MergeMethod
from mergeready.merging.parameter import add_delta, merged_chunks, merged_delta
from mergeready.merging.settings import MergeSettings, Setting
from mergeready.merging.task_arithmetic import TaskArithmetic

Absent: TypeAlias = Literal["unchanged", "left_out"]
"""What an expert without a parameter is for it: unchanged there, or no expert there at all."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Merged factors of one module's weight."""

    kind: SlotKind
    delta: LowRank


@dataclass
class Changes:
    """All merged changes, in the base's order.

    Attributes:
        factors: Base name to factors.
        values: Base name to the whole new value of a parameter that was trained whole, fp32.
        rows: Base name to trained rows: their indices and new values.
        modules: Base name to the module's own name, for all of them.
        compressed: What compression kept, for parameters that went through it.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    compressed: dict[str, Compressed] = field(default_factory=dict)


def linear_factors(method: MergeMethod, weights: Sequence[float]) -> list[float] | None:
    """The factors of a method that is a weighted sum of deltas, else None.

    >>> linear_factors(Average(), [1.0, 3.0]), linear_factors(TaskArithmetic(), [1.0, 3.0])
    ([0.25, 0.75], [1.0, 3.0])
    """
    if isinstance(method, TaskArithmetic):
        return list(weights)
    if isinstance(method, Average):
        total = sum(weights)
        return [weight / total if total else 0.0 for weight in weights]
    return None


def merged_changes(
    base: Base, vectors: Sequence[AdapterTaskVector], settings: MergeSettings, rank: Rank, absent: Absent
) -> Changes:
    """Merge adapters in delta space.

    Raises:
        UnsupportedError: If something has no exact low-rank form and no rank is given, or no form in an adapter at
            all; all are listed.
    """
    changes, problems = Changes(), []
    names = [name for name in base.source.infos if any(name in vector for vector in vectors)]
    for name in names:
        chosen = [i for i, vector in enumerate(vectors) if absent == "unchanged" or name in vector]
        setting = settings.at(name)
        own = Setting(setting.method, setting.scale, [setting.weights[i] for i in chosen])
        taken = [vectors[i] for i in chosen]
        problem = _merge_one(changes, base, name, taken, own, rank)
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise UnsupportedError(f"this merge has no form as an adapter: {listing(problems, 6)}.")
    changes.modules = _module_names(names, vectors)
    return changes


def _merge_one(
    changes: Changes,
    base: Base,
    name: str,
    vectors: Sequence[AdapterTaskVector],
    setting: Setting,
    rank: Rank,
) -> str | None:
    slots = [vector.slots[name] for vector in vectors if name in vector]
    kinds = {slot.kind for slot in slots}
    if "experts" in kinds:
        return "stacks of experts can only be folded (output_format='full')"
    if "rows" in kinds and len(kinds) > 1:
        return "trained rows and other changes of one embedding can only be folded (output_format='full')"
    if "rows" in kinds:
        changes.rows[name] = _rows(base, name, vectors, setting)
    elif kinds <= {"copy", "bias"} or "copy" in kinds:
        changes.values[name] = _value(base, name, vectors, setting)
    else:
        dora = any(slot.dora for slot in slots)
        rebased = not dora and any(name in v and not isinstance(v[name], LowRank) for v in vectors)
        factors = linear_factors(setting.method, setting.weights)
        dense = dora or rebased or factors is None
        if isinstance(rank, str):
            if dora or rebased or factors is None:
                why = f"{setting.method.name} gives changes of full rank"
                why = "its factors lie on other weights than the base's" if rebased else why
                why = "DoRA is not low-rank" if dora else why
                return f"{why}: choose `rank`, or output_format='full'"
            delta = _summed(name, vectors, setting, factors)
        else:
            found = (
                factorized(_matrix(base, name, vectors, setting), rank, base.source.infos[name].shape)
                if dense
                else truncated(_summed(name, vectors, setting, factors or []), rank)
            )
            changes.compressed[name], delta = found, found.delta
        changes.factors[name] = Factors(slots[0].kind, delta)
    return None


def _summed(name: str, vectors: Sequence[TaskVector], setting: Setting, factors: Sequence[float]) -> LowRank:
    deltas, own = [], []
    for vector, factor in zip(vectors, factors, strict=True):
        delta = vector.get(name)
        if isinstance(delta, LowRank):
            deltas.append(delta)
            own.append(factor * setting.scale)
    return concatenated(deltas, own)


def _matrix(base: Base, name: str, vectors: Sequence[TaskVector], setting: Setting) -> Tensor:
    """The merged change as a dense matrix, for what has no low-rank form."""
    info = base.source.infos[name]
    merged = merged_delta(setting.method, name, info, vectors, setting.weights)
    matrix = torch.zeros(info.shape) if merged is None else merged.mul_(setting.scale)
    return matrix.reshape(info.shape[0], -1)


def _value(base: Base, name: str, vectors: Sequence[TaskVector], setting: Setting) -> Tensor:
    original = base.source.read(name)
    delta = merged_delta(setting.method, name, base.source.infos[name], vectors, setting.weights)
    if delta is None:
        return original.float().cpu()
    return add_delta(original, delta, setting.scale, torch.float32).cpu()


def _rows(base: Base, name: str, vectors: Sequence[TaskVector], setting: Setting) -> tuple[Tensor, Tensor]:
    """New values of all rows that some expert trained."""
    deltas = [vector[name] for vector in vectors if name in vector]
    found = torch.cat([delta.index for delta in deltas if isinstance(delta, Rows)])
    index = torch.tensor(sorted(set(found.tolist())), dtype=torch.long)
    info = base.source.infos[name]
    width = info.numel // info.rows
    merged = torch.zeros(len(index), width)
    for start, stop, values in merged_chunks(setting.method, name, info, vectors, setting.weights):
        inside = (index * width >= start) & (index * width < stop)
        merged[inside] = values.reshape(-1, width)[index[inside] - start // width]
    old = torch.cat([base.source.read_rows(name, row, row + 1) for row in index.tolist()]).cpu()
    new = add_delta(old.reshape(len(index), width), merged, setting.scale, torch.float32)
    return index, new.reshape(len(index), *info.shape[1:])


def _module_names(names: Sequence[str], vectors: Sequence[AdapterTaskVector]) -> dict[str, str]:
    """Modules as the adapters call them while they agree, else as the base does."""
    found: dict[str, str] = {}
    for vector in vectors:
        for name, slot in vector.slots.items():
            if found.setdefault(name, slot.module) != slot.module:
                return {name: name.rpartition(".")[0] for name in names}
    own = {name: found[name] for name in names}
    prefixes = {_prefix(name.rpartition(".")[0], module) for name, module in own.items()}
    return own if len(prefixes) <= 1 else {name: name.rpartition(".")[0] for name in names}


def _prefix(base_module: str, module: str) -> tuple[str, str]:
    """What one name has before the other."""
    if module.endswith(base_module):
        return module.removesuffix(base_module), ""
    if base_module.endswith(module):
        return "", base_module.removesuffix(module)
    return base_module, module
