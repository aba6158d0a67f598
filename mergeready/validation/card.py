"""The model card of a validated expert: what the report says to people and to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeready.errors import MergeReadyError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.record import read_record
from mergeready.merging.provenance import is_hub_id
from mergeready.validation.check import Status, Verdict
from mergeready.validation.public import without_paths
from mergeready.validation.report import SCHEMA, Report
from mergeready.weights.model_card import read_card, split_card, update_card
from mergeready.weights.open import WeightsLike

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What hub ids look like. Whether a name is one or a path of this machine is told by ``is_hub_id``."""

_SIGNS: Mapping[Status, str] = {"passed": "✓", "failed": "✗", "not checked": "–"}


def write_card(
    folder: str | Path,
    report: Report,
    *,
    base_model: str | None = None,
    base: WeightsLike | Base | None = None,
    dataset: str | None = None,
) -> Path:
    """Write or update the expert's model card: our section, and the metadata that the hub understands.

    Sets ``base_model`` and ``base_model_relation`` where they are missing, adds tags, and keeps a ``mergeready:`` block
    with the base's fingerprint and the verdicts. With ``dataset``, scores go into ``model-index``. Nothing else in the
    card is touched, no local path gets in, and doing it twice changes nothing.

    Args:
        folder: The expert's folder.
        report: What validating it found.
        base_model: Hub id of the base; by default what the card or the adapter's configuration says.
        base: The base, whose fingerprint is written down.
        dataset: Hub id of the dataset that its own task was evaluated on.

    Raises:
        OptionError: If an id is no hub id, such as a local path.
        FormatError: If the card's metadata cannot be changed without touching what is not ours.
    """
    folder = Path(folder)
    for name, value in (("base_model", base_model), ("dataset", dataset)):
        if value is not None and not HUB_ID.fullmatch(value):
            raise OptionError(f"`{name}` must be a hub id such as org/name, not {value!r}.")
    known = split_card(read_card(folder))[0]
    fields: dict[str, Any] = {"tags": ["mergeready"]}
    chosen = base_model or (None if known.get("base_model") else _declared(folder))
    if chosen is not None:
        fields["base_model"] = chosen
    if not known.get("base_model_relation"):
        fields["base_model_relation"] = _relation(folder, known)
    if dataset is not None:
        index = _model_index(folder, known, report, dataset)
        if index is not None:
            fields["model-index"] = index
    fields["mergeready"] = _block(folder, report, base)
    return update_card(folder, fields, section(report))


def section(report: Report) -> str:
    """What people read: verdicts by level, figures, and what was not checked."""
    lines = ["## Composability", "", report.headline, ""]
    lines += ["| | check | found |", "|---|---|---|"]
    for verdict in report.verdicts:
        if verdict.status != "not checked":
            lines.append(
                f"| {_SIGNS[verdict.status]} | {_cell(verdict.title)} | {_cell(without_paths(verdict.message))} |"
            )
    left = [v for v in report.verdicts if v.status == "not checked"]
    if left:
        lines += ["", f"Not checked: {'; '.join(v.title for v in left)}."]
    versions = report.facts.get("versions") or {}
    lines += [
        "",
        f"Checked by [mergeready](https://pypi.org/project/mergeready/) {versions.get('mergeready', '')}.".strip(),
    ]
    return "\n".join(lines)


def _block(folder: Path, report: Report, base: WeightsLike | Base | None) -> dict[str, Any]:
    block: dict[str, Any] = {"schema": SCHEMA, "merge_ready": report.is_merge_ready}
    record = read_record(folder)
    if base is not None:
        block["base_fingerprint"] = Base.open(base).identity.fingerprint
    elif record is not None:
        block["base_fingerprint"] = record["base"]["fingerprint"]
    for fact in ("revision", "format"):
        if report.facts.get(fact):
            block[fact] = report.facts[fact]
    block["verdicts"] = {verdict.id: verdict.status for verdict in report.verdicts}
    return block


def _model_index(
    folder: Path, known: Mapping[str, Any], report: Report, dataset: str
) -> list[dict[str, Any]] | None:
    """The card's ``model-index`` with our results in the place of older ones of ours."""
    results = []
    for verdict in report.verdicts:
        if verdict.id == "C402" and verdict.value is not None:
            results.append(_result(dataset, "retention", "Retention after merging", verdict))
        if verdict.id == "E302" and verdict.value is not None:
            results.append(_result(dataset, "gain", "Gain over the base", verdict))
    if not results:
        return None
    existing = known.get("model-index")
    entries = [dict(entry) for entry in existing] if isinstance(existing, list) else []
    if not entries:
        entries = [{"name": folder.resolve().name, "results": []}]
    others = [
        r for r in entries[0].get("results") or [] if (r.get("source") or {}).get("name") != "mergeready"
    ]
    entries[0]["results"] = others + results
    return entries


def _result(dataset: str, kind: str, name: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "task": {"type": "other"},
        "dataset": {"type": dataset, "name": dataset},
        "metrics": [{"type": kind, "name": name, "value": round(float(verdict.value or 0.0), 6)}],
        "source": {"name": "mergeready", "url": "https://pypi.org/project/mergeready/"},
    }


def _relation(folder: Path, known: Mapping[str, Any]) -> str:
    """What the hub would take it for, which goes by the tag of merges that mergekit writes."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    tags = known.get("tags")
    return "merge" if isinstance(tags, list) and "merge" in tags else "finetune"


def _declared(folder: Path) -> str | None:
    from mergeready.experts.adapter_folder import read_adapter_config

    if not (folder / "adapter_config.json").is_file():
        return None
    try:
        name = read_adapter_config(folder).base_name
    except MergeReadyError:  # the report says what is wrong with it
        return None
    return name if name and is_hub_id(name) else None


def _cell(text: str) -> str:
    """Text as text in a table: names such as ``<s>`` are no tags, links or ends of cells."""
    return re.sub(r"([|\[*])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;")).replace("\n", " ")
