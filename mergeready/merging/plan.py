"""What a merge will read, write and hold in memory, from names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

import torch
from rich.filesize import decimal

from mergeready.errors import OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.open import Expert, ExpertLike, open_experts, require_experts
from mergeready.merging.double import Arithmetic, check_arithmetic
from mergeready.merging.method import MatrixMethod, MergeMethod
from mergeready.merging.parameter import check_dtype
from mergeready.merging.registry import MethodLike, make_method
from mergeready.merging.repeats import warn_if_repeated
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import (
    KEPT,
    Statistics,
    check_statistics,
    expert_statistics,
    warn_if_stale,
)
from mergeready.merging.workers import check_threads
from mergeready.weights.layout import DEFAULT_SHARD_BYTES, FolderLayout
from mergeready.weights.open import WeightsLike
from mergeready.weights.source import TensorInfo, is_mergeable

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".npz"}


@dataclass(frozen=True)
class PlannedInput:
    """What is read from one input.

    Attributes:
        label: How messages call it.
        format: ``base``, or the expert's format.
        parameters: Number of parameters of the base that it holds or changes.
        nbytes: Size of its weights in bytes.
        passes: How often they are read, at the most.
    """

    label: str
    format: str
    parameters: int
    nbytes: int
    passes: int = 1


@dataclass(frozen=True)
class PlannedMethod:
    """Which part of the model a method merges.

    Attributes:
        name: The method.
        parameters: Number of parameters.
        elements: Their elements together.
        passes: How often it reads the experts there.
    """

    name: str
    parameters: int
    elements: int
    passes: int


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        inputs: The base, then the experts.
        methods: What each merge method does.
        files: Name and size in bytes of each file of weights that is written.
        read_bytes: Bytes to read, all passes together.
        write_bytes: Bytes to write.
        peak_bytes: Most memory in bytes that tensors need at one time, an upper estimate. The interpreter and its
            libraries come on top (some 300 MB).
        threads: Number of threads.
        needs: Tensor name to the memory in bytes that merging it takes.
    """

    inputs: tuple[PlannedInput, ...]
    methods: tuple[PlannedMethod, ...]
    files: Mapping[str, int]
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    threads: int
    needs: Mapping[str, int] = field(repr=False)


@dataclass(frozen=True)
class MergeJob:
    """A merge into a folder that was checked and can begin.

    Attributes:
        base: The base.
        experts: The experts.
        settings: What is done to which parameter.
        layout: Where the result's bytes go.
        plan: What it will cost.
        dtype: Dtype of merged parameters; None for the base's own.
        arithmetic: Dtype of sums.
        statistics: Where running statistics come from.
    """

    base: Base
    experts: tuple[Expert, ...]
    settings: MergeSettings
    layout: FolderLayout
    plan: MergePlan
    dtype: torch.dtype | None
    arithmetic: Arithmetic
    statistics: Statistics

    @classmethod
    def make(
        cls,
        base: WeightsLike | Base,
        experts: Sequence[ExpertLike],
        method: MethodLike,
        *,
        scale: float = 1.0,
        weights: Sequence[float] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = None,
        arithmetic: Arithmetic = "float32",
        statistics: Statistics = "base",
        strict: bool = True,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        memory: int | None = None,
        threads: int | None = None,
        **parameters: Any,
    ) -> MergeJob:
        """Open and check everything; see :func:`mergeready.merging.merge_folders` for the arguments."""
        require_experts(experts)
        settings = MergeSettings.make(
            method, len(experts), scale=scale, weights=weights, overrides=overrides, **parameters
        )
        check_arithmetic(arithmetic, settings)
        check_dtype(dtype)
        check_statistics(statistics)
        count = check_threads(threads)
        base = Base.open(base)
        opened = tuple(open_experts(experts, base, strict=strict))
        settings.check(base.source, [expert.vector for expert in opened])
        warn_if_repeated(base, opened)
        warn_if_stale(base.source, expert_statistics(opened), KEPT[statistics])
        infos = {name: _output_info(name, info, dtype) for name, info in base.source.infos.items()}
        layout = FolderLayout.plan(infos, shard_bytes=shard_bytes)
        plan = _plan(base, opened, settings, layout, memory, count)
        return cls(base, opened, settings, layout, plan, dtype, arithmetic, statistics)


def merge_plan(
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    method: MethodLike = "task_arithmetic",
    **options: Any,
) -> MergePlan:
    """What :func:`mergeready.merging.merge_folders` would do with the same arguments, without doing it.

    Inputs are opened and checked as for the merge itself: of full models headers and samples are read, adapters
    whole. Time grows linearly with the number of tensors.

    Args:
        base: The base.
        experts: The experts.
        method: A method's name or a method with its parameters.
        **options: As for ``merge_folders``, as far as they change what is done.

    Raises:
        MergeReadyError: Whatever the merge would raise before it begins.

    Example:
        >>> base = {"layer.weight": torch.zeros(4, 4)}
        >>> plan = merge_plan(base, [{"layer.weight": torch.ones(4, 4)}], "ties", density=0.5)
        >>> plan.write_bytes, [method.name for method in plan.methods]
        (64, ['ties'])
    """
    return MergeJob.make(base, experts, method, **options).plan


def _plan(
    base: Base,
    experts: Sequence[Expert],
    settings: MergeSettings,
    layout: FolderLayout,
    memory: int | None,
    threads: int,
) -> MergePlan:
    methods: dict[str, PlannedMethod] = {}
    needs: dict[str, int] = {}
    for name, info in base.source.infos.items():
        if not is_mergeable(name, info) or not any(name in expert.vector for expert in experts):
            needs[name] = info.nbytes if not is_mergeable(name, info) else _copy_bytes(info)
            continue
        method = _acting(settings.at(name).method, name, info)
        needs[name] = method.scratch_bytes(info, len(experts))
        known = methods.get(method.name, PlannedMethod(method.name, 0, 0, method.passes))
        methods[method.name] = PlannedMethod(
            method.name, known.parameters + 1, known.elements + info.numel, method.passes
        )
    _require_memory(needs, memory, settings)
    peak = sum(nlargest(threads, needs.values()))
    passes = max((method.passes for method in methods.values()), default=1)
    inputs = (_planned_base(base, passes), *(_planned_expert(expert, passes) for expert in experts))
    return MergePlan(
        inputs=inputs,
        methods=tuple(methods.values()),
        files={file.name: file.size for file in layout.files},
        read_bytes=sum(given.nbytes * given.passes for given in inputs),
        write_bytes=sum(info.nbytes for info in layout.infos.values()),
        peak_bytes=peak if memory is None else min(peak, memory),
        threads=threads,
        needs=needs,
    )


def _acting(method: MergeMethod, name: str, info: TensorInfo) -> MergeMethod:
    if isinstance(method, MatrixMethod) and not method.handles(name, info):
        return make_method(method.for_vectors())
    return method


def _require_memory(needs: Mapping[str, int], memory: int | None, settings: MergeSettings) -> None:
    if memory is None:
        return
    large = [
        f"{name} ({settings.at(name).method.name}: {decimal(need)})"
        for name, need in needs.items()
        if need > memory
    ]
    if large:
        raise OptionError(
            f"`memory` is {decimal(memory)}, and these parameters need more: {listing(large)}. Raise it to "
            f"{decimal(max(needs.values()))}, or give these parameters a method that works on pieces (`overrides`)."
        )


def _copy_bytes(info: TensorInfo) -> int:
    return 2 * min(info.nbytes, 2**20)


def _planned_base(base: Base, passes: int) -> PlannedInput:
    infos = base.source.infos
    return PlannedInput(
        base.source.label, "base", len(infos), sum(info.nbytes for info in infos.values()), passes
    )


def _planned_expert(expert: Expert, passes: int) -> PlannedInput:
    return PlannedInput(expert.label, expert.format, len(expert.vector), _stored_bytes(expert), passes)


def _stored_bytes(expert: Expert) -> int:
    if expert.folder is not None:
        files = (file for file in expert.folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        return sum(file.stat().st_size for file in files)
    source = expert.statistics
    return sum(info.nbytes for info in (expert.vector if source is None else source).infos.values())


def _output_info(name: str, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if dtype is None or not is_mergeable(name, info):
        return info
    return TensorInfo(info.shape, dtype)
