from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.open import Expert, ExpertLike, open_expert
from mergeready.experts.record import write_record
from mergeready.merging.parameter import (
    add_delta,
    check_dtype,
    merged_chunks,
    raise_if_broken,
    require_finite_chunk,
)
from mergeready.merging.registry import MethodLike
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import Statistics, check_statistics, merged_statistic
from mergeready.weights.open import WeightsLike
from mergeready.weights.source import TensorInfo, chunk_ranges, is_mergeable
from mergeready.weights.writer import DEFAULT_SHARD_BYTES, FolderWriter


def merge_folders(
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    output: str | Path,
    method: MethodLike = "task_arithmetic",
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    statistics: Statistics = "base",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = True,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    **parameters: Any,
) -> Path:
    """Merge experts into a model folder, parameter by parameter, holding one piece of one parameter at a time.

    Everything is opened and checked before the first byte is written; the folder appears when it is complete.

    Args:
        base: The base that all experts started from.
        experts: Experts of any kind that ``open_expert`` understands.
        output: The folder to make; it must not contain an input's folder.
        method: A method's name or a method with its parameters.
        scale: Factor on the merged delta.
        weights: One factor an expert; 1 each by default.
        dtype: Floating dtype of merged parameters; the base's own by default.
        statistics: Where running statistics come from: ``base``, or the ``average`` over full experts.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        strict: See ``open_expert``.
        overwrite: Replace ``output`` if it exists.
        shard_bytes: Upper size of one file in bytes.
        **parameters: The method's parameters, such as ``density=0.2``.

    Returns:
        The path of the folder.

    Raises:
        MergeReadyError: One of the kinds that ``open_expert`` lists; ``OutputExistsError``; ``OptionError``;
            ``NonFiniteError`` if the result would hold NaN or infinite values. Nothing is left behind then.
    """
    if not experts:
        raise OptionError("`experts` is empty: there is nothing to merge.")
    settings = MergeSettings.make(
        method, len(experts), scale=scale, weights=weights, overrides=overrides, **parameters
    )
    base = Base.open(base)
    opened = [open_expert(expert, base, strict=strict) for expert in experts]
    settings.check([expert.vector for expert in opened])
    _require_apart(Path(output), [base.folder, *(expert.folder for expert in opened)])
    check_dtype(dtype)
    check_statistics(statistics)
    infos = {name: _output_info(name, info, dtype) for name, info in base.source.infos.items()}
    writer = FolderWriter(output, infos, shard_bytes=shard_bytes, companions=base.folder, overwrite=overwrite)
    with writer:
        _write_all(writer, base, opened, settings, statistics)
        write_record(writer.folder, base.identity, merge=settings.describe() | {"experts": len(opened)})
        if dtype is not None:
            _set_config_dtype(writer.folder / "config.json", dtype)
    return Path(output)


def _require_apart(output: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse an output whose replacement would delete what is being read."""
    for folder in inputs:
        if folder is not None and output.resolve() in folder.resolve().parents:
            raise OptionError(
                f"{output} holds {folder}, which is an input of this merge. Name another output."
            )


def _write_all(
    writer: FolderWriter,
    base: Base,
    experts: Sequence[Expert],
    settings: MergeSettings,
    statistics: Statistics,
) -> None:
    vectors = [expert.vector for expert in experts]
    broken: list[str] = []
    for name, info in base.source.infos.items():
        if not is_mergeable(name, info):
            writer.write(name, merged_statistic(name, base.source, experts, statistics))
            continue
        written = False
        setting = settings.at(name)
        for start, stop, delta in merged_chunks(setting.method, name, info, vectors, setting.weights):
            original = base.source.read_flat(name, start, stop)
            merged = add_delta(original, delta, setting.scale, writer.infos[name].dtype)
            require_finite_chunk(merged, name, broken)
            writer.write(name, merged, start)
            written = True
        if not written:
            for start, stop in chunk_ranges(info):
                writer.write(name, base.source.read_flat(name, start, stop), start)
    raise_if_broken(broken, vectors)


def _output_info(name: str, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if dtype is None or not is_mergeable(name, info):
        return info
    return TensorInfo(info.shape, dtype)


def _set_config_dtype(config: Path, dtype: torch.dtype) -> None:
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in content else "torch_dtype"
        content[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
