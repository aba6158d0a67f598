from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, OptionError, listing
from mergeready.experts.adapter import AdapterTaskVector
from mergeready.experts.base import Base
from mergeready.experts.delta import LowRank
from mergeready.experts.open import Expert, ExpertLike, open_experts, require_experts
from mergeready.experts.peft_config import CONFIG_NAME
from mergeready.experts.record import write_record
from mergeready.merging.adapters.adapterhub_output import write_adapterhub
from mergeready.merging.adapters.changes import Absent, Changes, merged_changes
from mergeready.merging.adapters.compress import Rank, check_rank, rounding_error
from mergeready.merging.adapters.peft_output import write_peft
from mergeready.merging.folders import merge_folders, require_apart
from mergeready.merging.inner import with_data
from mergeready.merging.parameter import check_dtype
from mergeready.merging.registry import MethodLike
from mergeready.merging.repeats import warn_if_repeated
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import KEPT, expert_statistics, warn_if_stale
from mergeready.weights.atomic import new_folder
from mergeready.weights.open import WeightsLike

OutputFormat: TypeAlias = Literal["peft", "adapterhub", "full"]


@dataclass(frozen=True)
class MergedAdapter:
    """What a merge of adapters made, and what it cost.

    Attributes:
        folder: Where it is.
        format: ``peft``, ``adapterhub`` or ``full``.
        ranks: Base name to rank of its factors.
        kept: Base name to the share of ‖D‖² that its factors hold; only parameters that were compressed.
        energy: The same over all compressed parameters together; 1 if none was.
        overlap: Jaccard index of the adapted parameters, for each pair of experts: 1 where they adapt the same ones.
        rounding: Largest ‖D − D̃‖ / ‖D‖ of a parameter from storing factors in a narrower dtype, estimated.
        notes: What is to be known of the experts, each once, such as training on quantised weights.
    """

    folder: Path
    format: OutputFormat
    ranks: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    energy: float = 1.0
    overlap: Sequence[Sequence[float]] = ()
    rounding: float = 0.0
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return {
            "format": self.format,
            "rank": max(self.ranks.values(), default=0),
            "kept_energy": self.energy,
            "kept_energy_by_parameter": dict(self.kept),
            "target_overlap": [list(row) for row in self.overlap],
            "rounding": self.rounding,
            "notes": list(self.notes),
        }

    def summary(self) -> list[str]:
        """Lines for people: rank, kept energy in total and where it is least, overlap of targets."""
        lines = []
        if self.ranks:
            low, high = min(self.ranks.values()), max(self.ranks.values())
            ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
            exact = "" if self.kept else ", exact"
            modules = "1 module" if len(self.ranks) == 1 else f"{len(self.ranks)} modules"
            lines.append(f"{modules} of {ranks}{exact}.")
        if self.kept:
            worst = min(self.kept, key=lambda name: self.kept[name])
            lines.append(
                f"Compression kept {self.energy:.1%} of the merged change's energy; least in {worst} "
                f"({self.kept[worst]:.1%})."
            )
        pairs = [value for i, row in enumerate(self.overlap) for value in row[:i]]
        if pairs and min(pairs) < 1:
            lines.append(f"Experts adapt different modules: Jaccard index down to {min(pairs):.2f}.")
        if self.rounding:
            lines.append(
                f"Storing in a narrower dtype changed the merged change by up to {self.rounding:.2%}."
            )
        return [*lines, *(f"Note: {note}." for note in self.notes)]


def merge_adapters(
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    output: str | Path,
    method: MethodLike = "task_arithmetic",
    *,
    output_format: OutputFormat = "peft",
    rank: Rank = "exact",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    absent: Absent = "unchanged",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    overwrite: bool = False,
    **parameters: Any,
) -> MergedAdapter:
    """Merge adapters of one base into one adapter, in delta space.

    Factors are never averaged: ``Σ cᵢ sᵢ Bᵢ Aᵢ`` is ``[c₁s₁B₁, c₂s₂B₂, …] [A₁; A₂; …]`` exactly, with ranks that add.
    With a ``rank`` the result is cut to the best one of that rank, and the share of energy kept is reported for each
    parameter. Methods that are no weighted sum give changes of full rank, and so does DoRA: both need a ``rank``, or
    ``output_format="full"``.

    Args:
        base: The base that all adapters were trained from.
        experts: Adapters of any format that ``open_expert`` reads, of any ranks, on any modules.
        output: The folder to make.
        method: A method's name or a method with its parameters.
        output_format: ``peft``; ``adapterhub`` (load it with ``use_safetensors=True``); or ``full``: folded into the
            base, by ``merge_folders``.
        rank: ``"exact"``; a whole number; or the share of energy to keep, such as 0.9, for each parameter.
        scale: Factor on the merged change.
        weights: One factor an expert; 1 each by default.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        absent: An expert that does not adapt a module counts there as ``unchanged``, or is ``left_out``: a mean is then
            over those that have it. Methods that have data about experts need ``unchanged``.
        dtype: Dtype of the factors (or of the folded model); fp32 (or the base's) by default.
        strict: See ``open_expert``.
        overwrite: Replace ``output`` if it exists.
        **parameters: The method's parameters, such as ``density=0.2``.

    Returns:
        Where it is, with ranks, kept energy, rounding and overlap of targets. The folder's ``mergeready.json`` records
        them as well.

    Raises:
        OptionError: If an argument is out of range, or an expert is a full model.
        UnsupportedError: If the result has no form as such an adapter; all reasons are listed.
        MergeReadyError: As ``open_expert`` does; ``OutputExistsError``; ``NonFiniteError``.
    """
    if output_format not in get_args(OutputFormat):
        raise OptionError(f"`output_format` must be peft, adapterhub or full, not {output_format!r}.")
    if absent not in get_args(Absent):
        raise OptionError(f"`absent` must be unchanged or left_out, not {absent!r}.")
    require_experts(experts)
    check_rank(rank)
    check_dtype(dtype)
    settings = MergeSettings.make(
        method, len(experts), scale=scale, weights=weights, overrides=overrides, **parameters
    )
    if absent == "left_out":
        _require_no_places(settings)
    base = Base.open(base)
    opened = open_experts(experts, base, strict=strict)
    vectors = _adapters(opened)
    settings.check(base.source, vectors)
    overlap = target_overlap(vectors)
    notes = tuple(dict.fromkeys(note for expert in opened for note in expert.notes))
    if output_format == "full":
        if rank != "exact" or absent != "unchanged":
            raise OptionError("`rank` and `absent` belong to adapters; a folded model is exact already.")
        folder = merge_folders(
            base,
            opened,
            output,
            method,
            scale=scale,
            weights=weights,
            overrides=overrides,
            dtype=dtype,
            strict=strict,
            overwrite=overwrite,
            **parameters,
        )
        return MergedAdapter(folder, "full", overlap=overlap, notes=notes)
    require_apart(Path(output), [base.folder, *(expert.folder for expert in opened)])
    warn_if_repeated(base, opened)
    warn_if_stale(base.source, expert_statistics(opened), KEPT["base"])
    changes = merged_changes(base, vectors, settings, rank, absent)
    write = write_peft if output_format == "peft" else write_adapterhub
    out_dtype = dtype or torch.float32
    with new_folder(Path(output), overwrite=overwrite) as folder:
        tensors = write(folder, changes, base, _agreed(opened, output_format), out_dtype)
        _require_finite(tensors)
        made = replace(_report(Path(output), output_format, changes, overlap, out_dtype), notes=notes)
        facts = settings.describe() | {"experts": len(opened), "absent": absent, "rank": rank}
        write_record(folder, base.identity, merge=facts | {"adapter": made.describe()})
    return made


def target_overlap(vectors: Sequence[AdapterTaskVector]) -> list[list[float]]:
    """Jaccard index |A ∩ B| / |A ∪ B| of the parameters that each pair of adapters changes."""
    names = [set(vector) for vector in vectors]
    return [[len(a & b) / len(a | b) if a | b else 1.0 for b in names] for a in names]


def _require_no_places(settings: MergeSettings) -> None:
    """Refuse methods that find data about an expert by its place among all, which changes where some are left out.

    Raises:
        OptionError: If there is one.
    """
    found = dict.fromkeys(name for method in settings.methods if (name := with_data(method)) is not None)
    if found:
        raise OptionError(f"{listing(found)} has data about all experts: `absent` must be unchanged.")


def _adapters(experts: Sequence[Expert]) -> list[AdapterTaskVector]:
    others = [expert.label for expert in experts if not isinstance(expert.vector, AdapterTaskVector)]
    if others:
        raise OptionError(
            f"{listing(others)} are no adapters, so their merge has no form as one: use merge_folders, or extract a "
            "LoRA from them first."
        )
    return [expert.vector for expert in experts if isinstance(expert.vector, AdapterTaskVector)]


def _agreed(experts: Sequence[Expert], output_format: OutputFormat) -> dict[str, Any]:
    """Fields that the configurations of all experts of the output's format agree on."""
    configs = [
        json.loads((expert.folder / CONFIG_NAME).read_text(encoding="utf-8"))
        for expert in experts
        if expert.folder is not None and expert.format == output_format
    ]
    if not configs:
        return {}
    first, *others = configs
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _report(
    folder: Path,
    output_format: OutputFormat,
    changes: Changes,
    overlap: list[list[float]],
    dtype: torch.dtype,
) -> MergedAdapter:
    kept = {name: found.share for name, found in changes.compressed.items()}
    energy = sum(found.energy for found in changes.compressed.values())
    held = sum(found.share * found.energy for found in changes.compressed.values())
    rounding = 0.0
    if dtype != torch.float32:
        rounding = max((_rounding(change.delta, dtype) for change in changes.factors.values()), default=0.0)
    return MergedAdapter(
        folder,
        output_format,
        {name: change.delta.A.shape[0] for name, change in changes.factors.items()},
        kept,
        held / energy if energy else 1.0,
        overlap,
        rounding,
    )


def _rounding(delta: LowRank, dtype: torch.dtype) -> float:
    return rounding_error(delta, LowRank(delta.B.to(dtype), delta.A.to(dtype), delta.shape))


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise NonFiniteError(
            f"merged factors are NaN or infinite: {listing(broken)}. Nothing was written. A scale, a weight or the "
            "dtype is out of range."
        )
