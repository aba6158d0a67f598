"""What is shared with an expert: its fingerprint, its report as JSON and as a page, and a section of its card."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeready.errors import MergeReadyError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import SUFFIX, Fingerprint
from mergeready.experts.open import open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.finish import FinishedRun
from mergeready.training.history import History
from mergeready.training.options import MonitorOptions, with_defaults
from mergeready.training.peers import Peer
from mergeready.validation.card import HUB_ID, write_card
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
    peers = [peer.expert if isinstance(peer, Peer) else peer for peer in run.peers]
    for folder in dict.fromkeys(run.picks.values()):
        try:
            report = validate(folder, run.base, peers=peers)
            made = fingerprint_of(folder, run.base, f"{name}-{folder.name}")
            write_shared(folder, public_report(report, made.label), made, base=run.base, history=run.history)
        except (MergeReadyError, OSError) as error:
            logger.warning("no report on the picked %s: %s", folder, error)


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
    known = None if opened is None or opened.name is None else opened.name
    if base_model is None and known and HUB_ID.fullmatch(known) and not Path(known).exists():
        base_model = known
    page, data = folder / f"{REPORT_NAME}.html", folder / f"{REPORT_NAME}.json"
    write_page(page, report, history)
    with new_file(data) as temporary:
        text = json.dumps(finite(report.to_json()), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    files = [page, data]
    if fingerprint is not None:
        files.append(fingerprint.save(folder / f"{fingerprint.label.replace('/', '--')}{SUFFIX}"))
    return [*files, write_card(folder, report, base_model=base_model, base=opened, dataset=dataset)]


def finite(value: Any) -> Any:
    """Plain data with null where a number is not finite, which JSON cannot hold.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
