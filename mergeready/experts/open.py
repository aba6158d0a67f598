from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import nn

from mergeready.errors import MismatchError, NonFiniteError, OptionError, UnsupportedError, listing
from mergeready.experts.adapter import AdapterTaskVector
from mergeready.experts.adapter_folder import explain_missing_weights, open_adapter, refuse_foreign_lora
from mergeready.experts.base import Base, require_real, require_unquantised, require_wide_floats
from mergeready.experts.fingerprint import is_fingerprint
from mergeready.experts.kinship import require_kinship
from mergeready.experts.peft_config import CONFIG_NAME
from mergeready.experts.record import recorded_base
from mergeready.experts.task_vector import FullTaskVector, TaskVector
from mergeready.experts.tokens import require_same_tokens, token_rows
from mergeready.weights.names import match_names
from mergeready.weights.open import WeightsLike, open_weights, resolve_folder
from mergeready.weights.source import WeightSource, equal, is_mergeable

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Expert:
    """An expert on a base, ready to be measured and merged.

    Attributes:
        label: How messages call it.
        format: ``full``, ``peft``, ``adapterhub`` or ``mlx``, or ``task vector`` for one that was made in memory.
        vector: Its task vector.
        folder: Where it lies, if it is a folder.
        extra: Its parameters that the base does not have, such as a task's own head. They are not merged.
        missing: Base parameters that it does not have. They count as unchanged.
        statistics: Source of its running statistics: a full model itself, or what an adapter stores of them.
        base_checked: How its base was verified: ``recorded`` (exact), ``weights`` (plausible) or ``nothing``.
        added_tokens: Tokens that the base's tokenizer does not know, with the rows of the base that they took.
        notes: What else is to be known, such as training on quantised weights.
    """

    label: str
    format: Literal["full", "peft", "adapterhub", "mlx", "task vector"]
    vector: TaskVector
    folder: Path | None = None
    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    statistics: WeightSource | None = None
    base_checked: Literal["recorded", "weights", "nothing"] = "nothing"
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


ExpertLike: TypeAlias = WeightsLike | Expert | TaskVector


def open_expert(
    expert: ExpertLike,
    base: WeightsLike | Base,
    *,
    strict: bool = True,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Expert:
    """Open an expert relative to its base: a full checkpoint, or an adapter of PEFT, AdapterHub or MLX.

    Args:
        expert: A folder, hub id, state dict or live module; or an expert or task vector that is open already.
        base: The base it was trained from.
        strict: Refuse parameters that only the expert or only the base has. Otherwise the former stay out of
            the merge (``Expert.extra``) and the latter count as unchanged (``Expert.missing``).
        revision: Commit, tag or branch; only for a hub id.
        allow_pickle: See :func:`mergeready.weights.open_weights`.

    Raises:
        BaseMismatchError: If it was trained from another base, as far as that can be told.
        MismatchError: If names or shapes do not fit; all are listed.
        UnsupportedError: If it is of a kind that cannot be folded into weights.
        NotTrainedError: If it is an adapter that changes nothing.
        NonFiniteError: If an adapter holds NaN or infinite values.
        FormatError: If its files cannot be read.
    """
    base = Base.open(base)
    if isinstance(expert, TaskVector):
        expert = Expert(expert.label, "task vector", expert, base_checked="recorded")
    if isinstance(expert, Expert):
        base.identity.require_same(expert.vector.base, expert.label, expert.vector)
        return expert
    if isinstance(expert, str | Path):
        return _open_folder(expert, base, strict, revision, allow_pickle)
    source = open_weights(expert)
    refuse_foreign_lora(source.infos, source.label)
    if any(".lora_" in name for name in source.infos):
        raise OptionError(
            f"{source.label} holds LoRA factors without their configuration: pass the adapter's folder, or "
            "LiveExpert(model, base).vector for a live PEFT model."
        )
    return _open_full(source, base, strict)


def _open_folder(
    path: str | Path, base: Base, strict: bool, revision: str | None, allow_pickle: bool
) -> Expert:
    if is_fingerprint(path):
        raise UnsupportedError(
            f"{path} is a fingerprint: it holds no weights, so it can be compared and measured against, not merged or "
            "evaluated. Name the expert itself."
        )
    folder = resolve_folder(path, revision=revision)
    is_adapter = (folder / CONFIG_NAME).is_file()
    recorded = recorded_base(folder) if folder.is_dir() else None
    if recorded is not None:
        base.identity.require_same(recorded, str(path))
    if is_adapter:
        expert = _open_adapter(folder, str(path), base, strict, recorded is not None, allow_pickle)
    else:
        if folder.is_dir() and not (folder / "config.json").is_file():
            explain_missing_weights(folder, str(path))
        source = open_weights(folder, allow_pickle=allow_pickle)
        source.label = str(path)
        expert = _open_full(source, base, strict, folder if folder.is_dir() else None, recorded is not None)
    return expert


def _open_adapter(
    folder: Path, label: str, base: Base, strict: bool, recorded: bool, allow_pickle: bool
) -> Expert:
    kind, vector, tokens = open_adapter(folder, base, label, allow_pickle=allow_pickle)
    _require_finite_file(vector)
    vector.require_trained()
    if strict:
        tokens.refuse_lost(label)
        _refuse_extra(label, vector.extra, base)
    checked: Literal["recorded", "nothing"] = "recorded" if recorded else "nothing"
    return Expert(
        label,
        kind,
        vector,
        folder,
        vector.extra,
        statistics=vector.statistics(),
        base_checked=checked,
        added_tokens=tokens.added,
        notes=(*vector.notes, *tokens.notes),
    )


def _require_finite_file(vector: AdapterTaskVector) -> None:
    source = vector.source
    broken = [name for name in source.infos if not bool(torch.isfinite(source.read(name)).all())]
    if broken:
        raise NonFiniteError(f"{vector.label} holds NaN or infinite values in {listing(broken)}.")


def _open_full(
    source: WeightSource, base: Base, strict: bool, folder: Path | None = None, recorded: bool = False
) -> Expert:
    refuse_foreign_lora(source.infos, source.label)
    require_wide_floats(source)
    require_unquantised(source, base.source)
    require_real(source, base.source)
    tokens = token_rows(source, base, folder)
    source = tokens.source
    if strict:
        tokens.refuse_lost(source.label)
    names, extra, missing = pair_with_base(source, base, strict=strict)
    if not recorded:
        require_kinship(source, base.source, names)
    vector = FullTaskVector(source, base.source, names, base.identity)
    checked: Literal["recorded", "weights"] = "recorded" if recorded else "weights"
    return Expert(
        source.label, "full", vector, folder, extra, missing, source, checked, tokens.added, tokens.notes
    )


def require_experts(experts: Sequence[ExpertLike]) -> None:
    """Raise unless these are experts in a list, one at least.

    Raises:
        OptionError: If it is a single one, which would be taken for a list of letters or names, or none.
    """
    _require_list(experts)
    if not experts:
        raise OptionError("`experts` is empty: there is nothing to merge.")


def _require_list(experts: object) -> None:
    if isinstance(experts, str | Path | Mapping | nn.Module | WeightSource | Expert):
        raise OptionError("`experts` must be a list, also where there is only one.")


def open_experts(
    experts: Sequence[ExpertLike], base: WeightsLike | Base, *, strict: bool = True
) -> list[Expert]:
    """Open experts that are to be merged; see :func:`open_expert`.

    Raises:
        MismatchError: Also if two of them gave one row of the embeddings to different tokens.
        OptionError: If it is a single one.
    """
    _require_list(experts)
    base = Base.open(base)
    opened = [open_expert(expert, base, strict=strict) for expert in experts]
    require_same_tokens([expert.label for expert in opened], [expert.added_tokens for expert in opened])
    return opened


def pair_with_base(
    source: WeightSource, base: Base, *, strict: bool
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Pair a full model's parameters with the base's.

    Returns:
        Base name to own name; own names beyond the base; base names beyond the model. The last two are empty
        when ``strict``.

    Raises:
        MismatchError: If shapes differ, no name is common, two different tensors stand for one of the base, a mixture's
            experts are stacked in one of the two only, or ``strict`` and names are left over; all are listed at once.
    """
    own = {name: info for name, info in source.infos.items() if is_mergeable(name, info)}
    theirs = {name: info for name, info in base.source.infos.items() if is_mergeable(name, info)}
    match = match_names(
        own,
        theirs,
        aliases=source.other_names,
        base_aliases=base.source.other_names,
    )
    names: dict[str, str] = {}
    problems: list[str] = []
    for name, base_name in match.to_base.items():
        first = names.setdefault(base_name, name)
        if own[name].shape != theirs[base_name].shape:
            problems.append(f"{name} is {own[name].shape}, in the base {theirs[base_name].shape}")
        elif first != name and not equal(source, first, source, name):
            problems.append(f"{first} and {name} differ, and are one parameter in the base")
    if _stacked_in_one(match.extra, match.missing):
        problems.append(
            f"experts of a mixture are stacked in one of the two and apart in the other, such as "
            f"{listing([n for n in match.extra if _EXPERTS in n], 2)} (transformers 5 stacks them as it loads; open "
            "base, expert and peers all as loaded models, or all from folders)"
        )
    names |= {copy: names[name] for copy, name in _copies(base.source, names, match.missing).items()}
    missing = tuple(name for name in match.missing if name not in names)
    if not names:
        problems = [f"no parameter name of the base occurs ({listing(theirs, 3)})"]
    elif strict:
        problems += [f"{name} is missing" for name in missing]
        problems += [f"{name} is not in the base" for name in match.extra] if problems else []
    if problems:
        raise MismatchError(f"{source.label} does not fit the base {base.source.label}: {listing(problems)}.")
    if strict:
        _refuse_extra(source.label, match.extra, base)
    return names, match.extra, missing


def _copies(base: WeightSource, names: Mapping[str, str], missing: Sequence[str]) -> dict[str, str]:
    """Missing matrices of which the base stores a copy that is paired, and that copy's name.

    Some files hold tied embeddings twice. Models that were loaded from them have, and save, one tensor for both places.
    """
    infos = base.infos
    found = {}
    for copy in missing:
        same = (name for name in names if len(infos[name].shape) == 2 and infos[name] == infos[copy])
        name = next((name for name in same if equal(base, name, base, copy)), None)
        if name is not None and bool(base.read(name).any()):
            found[copy] = name
    return found


def _stacked_in_one(extra: Sequence[str], missing: Sequence[str]) -> bool:
    """Whether both sides have experts that the other lacks: they would count as unchanged, and be most of the model."""
    return any(_EXPERTS in name for name in extra) and any(_EXPERTS in name for name in missing)


def _refuse_extra(label: str, names: tuple[str, ...], base: Base) -> None:
    if names:
        raise MismatchError(
            f"{label} has parameters that the base {base.source.label} lacks: {listing(names)}. "
            "If they are a head of its own task, pass strict=False: they stay out of the merge."
        )
