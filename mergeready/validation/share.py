"""What is shared with an expert: its fingerprint, its report as JSON and as a page, and a section of its card."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from mergeready.errors import MergeReadyError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import SUFFIX, Fingerprint, is_fingerprint, open_fingerprint
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.merging.provenance import is_hub_id, public_name
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.finish import FinishedRun
from mergeready.training.history import History
from mergeready.training.options import MonitorOptions, with_defaults
from mergeready.training.peers import Peer, PeerLike
from mergeready.validation.card import write_card
from mergeready.validation.page import write_page
from mergeready.validation.public import public_report
from mergeready.validation.report import Report
from mergeready.validation.run import validate
from mergeready.weights.atomic import new_file
from mergeready.weights.open import WeightsLike

REPORT_NAME = "mergeready-report"

logger = logging.getLogger("mergeready")


def share_run(run: FinishedRun) -> None:
    """Write fingerprint, report and card section into each picked checkpoint's folder, so that they go where it goes.

    The report goes as far as it can without an evaluation: files, base, and fingerprints of peers. A pick that cannot
    be validated is logged, with the reason, and does not end a run that has succeeded.
    """
    name = run.folder.resolve().parent.name if run.folder.name == "mergeready" else run.folder.name
    for folder in dict.fromkeys(run.picks.values()):
        try:
            peers = [_named(peer, run.base) for peer in run.peers]
            report = validate(folder, run.base, peers=peers)
            made = fingerprint_of(folder, run.base, f"{name}-{folder.name}")
            write_shared(folder, public_report(report, made.label), made, base=run.base, history=run.history)
        except (MergeReadyError, OSError) as error:
            logger.warning("no report on the picked %s: %s", folder, error)


def _named(peer: PeerLike, base: Base) -> ExpertLike | Fingerprint:
    """A peer as validation takes it, under the name that the run gave it."""
    if not isinstance(peer, Peer):
        return peer
    if peer.name is None:
        return peer.expert
    if isinstance(peer.expert, Fingerprint) or is_fingerprint(peer.expert):
        return replace(open_fingerprint(peer.expert, base), label=public_name(peer.name))
    return replace(open_expert(peer.expert, base, strict=False), label=public_name(peer.name))


def with_sharing(options: MonitorOptions) -> MonitorOptions:
    """The options of a shell, which keeps and shares picks unless told otherwise."""
    return {"share": share_run, **with_defaults(options)}


def fingerprint_of(folder: str | Path, base: WeightsLike | Base, label: str | None = None) -> Fingerprint:
    """The fingerprint of an expert's folder.

    Raises:
        MergeReadyError: If the expert cannot be opened, or equals its base.
    """
    opened = Base.open(base)
    return take_fingerprint(open_expert(folder, opened, strict=False).vector, opened, label=label)


def write_shared(
    folder: Path,
    report: Report,
    fingerprint: Fingerprint | None,
    *,
    base: WeightsLike | Base | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    history: History | None = None,
) -> list[Path]:
    """Write what is shared into a folder; returns the files.

    Args:
        folder: An expert's folder, or one that shall be laid over it.
        report: What validating it found; see :func:`~mergeready.validation.public.public_report`.
        fingerprint: Its fingerprint.
        base: The base, whose fingerprint goes into the card, and its hub id if it was opened by one.
        base_model: Hub id of the base.
        dataset: Hub id of the dataset that its own task was evaluated on.
        history: Its training run, for the page's curves.
    """
    opened = None if base is None else Base.open(base)
    if base_model is None and opened is not None and opened.name is not None and is_hub_id(opened.name):
        base_model = opened.name
    page, data = folder / f"{REPORT_NAME}.html", folder / f"{REPORT_NAME}.json"
    write_page(page, report, history)
    with new_file(data) as temporary:
        text = json.dumps(report.to_json(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    files = [page, data]
    if fingerprint is not None:
        files.append(fingerprint.save(folder / f"{fingerprint.label.replace('/', '--')}{SUFFIX}"))
    return [*files, write_card(folder, report, base_model=base_model, base=opened, dataset=dataset)]
