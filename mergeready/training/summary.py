from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeready.training.history import History
from mergeready.training.schedule import Pacer
from mergeready.weights.atomic import new_file

SUMMARY_NAME = "summary.json"


def write_summary(
    folder: Path,
    history: History,
    picks: Mapping[str, int],
    measuring: Pacer,
    probing: Pacer | None,
    training_seconds: float,
    techniques: Mapping[str, float],
) -> dict[str, Any]:
    """Write what a run came to: its picks, why it stopped, and where its time went.

    Wall-clock times stand here and not in the history, which a resumed run writes byte by byte alike.

    Returns:
        What was written: ``picks`` by label, ``stopped``, ``seconds`` by kind, ``probes_skipped_for_time``; and the
        last figures of techniques that have some.
    """
    summary: dict[str, Any] = {
        "picks": dict(picks),
        "stopped": [{"step": d.step, "reason": d.reason, "acted": d.acted} for d in history.decisions],
        "seconds": {
            "measuring": measuring.spent,
            "probing": probing.spent if probing else 0.0,
            "training": training_seconds,
        },
        "probes_skipped_for_time": probing.skipped if probing else 0,
    }
    if techniques:
        summary["techniques"] = dict(techniques)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / SUMMARY_NAME) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
