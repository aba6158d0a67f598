"""What a merged folder says about where it comes from: a recipe with fingerprints of the inputs, and a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from mergeready.merging.inputs import file_fingerprint
from mergeready.merging.plan import WEIGHT_SUFFIXES, MergeJob
from mergeready.merging.recipe import RECIPE_NAME
from mergeready.merging.rounding import RoundingLoss
from mergeready.weights.model_card import CARD_NAME, with_fields

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def write_recipe(folder: Path, job: MergeJob) -> None:
    """Write everything that a result depends on, such that ``read_recipe`` reads it."""
    content = {
        "mergeready": version("mergeready"),
        "torch": str(torch.__version__),
        "base": {
            "label": public_name(job.base.source.label),
            "identity": job.base.identity.fingerprint,
            "files": _files(job.base.folder),
        },
        "experts": [
            {"label": public_name(expert.label), "format": expert.format, "files": _files(expert.folder)}
            for expert in job.experts
        ],
        "merge": public(job.settings.describe()),
        "dtype": None if job.dtype is None else _name(job.dtype),
        "arithmetic": job.arithmetic,
        "statistics": job.statistics,
    }
    text = "# `mergeready merge --config` repeats this. How files are fingerprinted: mergeready.merging.inputs.\n"
    text += yaml.safe_dump(content, sort_keys=False)
    (folder / RECIPE_NAME).write_text(text, encoding="utf-8")


def write_card(folder: Path, job: MergeJob, rounding: RoundingLoss) -> None:
    """Write a model card: what was merged, for readers and, as front matter, for the hub."""
    names = [job.base.source.label, *(expert.label for expert in job.experts)]
    ids = [name for name in dict.fromkeys(names) if is_hub_id(name)]
    relation: dict[str, Any] = {"base_model": ids, "base_model_relation": "merge"} if ids else {}
    card = with_fields(f"\n{_card_text(job, rounding)}", {**relation, "tags": ["merge", "mergeready"]})
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _card_text(job: MergeJob, rounding: RoundingLoss) -> str:
    facts = public(job.settings.describe())
    weights, overrides = facts.pop("weights"), facts.pop("overrides", {})
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    rows += [f"| where `{_cell(key)}` matches | {_cell(given)} |" for key, given in overrides.items()]
    rows += [f"| sums | {job.arithmetic} |"]
    experts = [
        f"| {_cell(public_name(expert.label))} | {expert.format} | {weight:g} |"
        for expert, weight in zip(job.experts, weights, strict=True)
    ]
    lost = (
        f" Rounding to {rounding.dtype} lost {rounding.total:.2%} of the merged change."
        if rounding.dtype
        else ""
    )
    return "\n".join(
        [
            "# Merged model",
            "",
            f"Experts of {_cell(public_name(job.base.source.label))}, merged with mergeready "
            f"{version('mergeready')}.{lost} Quality was not measured by the merge itself.",
            "",
            "| expert | format | weight |",
            "|---|---|---|",
            *experts,
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
            f"`{RECIPE_NAME}` holds the recipe with fingerprints of all inputs.",
            "",
        ]
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, and not a path of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public_name(name: str) -> str:
    """A hub id as it is; of a path only the last part, since the rest is nobody's business."""
    return name if is_hub_id(name) else Path(os.path.abspath(name)).name


def public(value: Any) -> Any:
    """Settings without the paths of this machine, as plain lists and dictionaries."""
    if isinstance(value, Mapping):
        return {str(key): public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value)):
        return public_name(str(value))
    return value


def _files(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    return {file.name: file_fingerprint(file) for file in weights}


def _cell(value: Any) -> str:
    """Text that does not end a table's cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
