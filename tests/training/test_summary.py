from __future__ import annotations

import json
from pathlib import Path

from mergeready.training.history import History
from mergeready.training.records import DecisionRecord
from mergeready.training.schedule import Pacer, Schedule
from mergeready.training.summary import write_summary


def test_it_says_what_was_picked_why_it_stopped_and_where_time_went(tmp_path: Path) -> None:
    history = History([DecisionRecord(step=8, reason="plateau", acted=True)])
    measuring = Pacer(Schedule(every=1), 10, 0)
    measuring.took(2.5)
    summary = write_summary(tmp_path / "run", history, {"expert": 4}, measuring, None, 100.0, {})
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == {
        "picks": {"expert": 4},
        "stopped": [{"step": 8, "reason": "plateau", "acted": True}],
        "seconds": {"measuring": 2.5, "probing": 0.0, "training": 100.0},
        "probes_skipped_for_time": 0,
    }
