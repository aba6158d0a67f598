from __future__ import annotations

import logging

from mergeready.training.history import History
from mergeready.training.records import MetricsRecord

logger = logging.getLogger("mergeready")

WORTH_SAYING = 0.1
"""Share of the norm that is rounding, above which it is said."""


def warn_of_rounding(record: MetricsRecord, history: History) -> None:
    """Say once in a run that a task vector is known through rounded weights only, where that matters.

    Args:
        record: The newest measurement.
        history: What was measured before it.
    """
    first = not any(earlier.resolution for earlier in history.metrics)
    if first and record.resolution is not None and record.resolution > WORTH_SAYING:
        logger.warning(
            "step %d: rounding alone would give %.0f %% of ‖τ‖, as weights exist in 16 bits only. If the training "
            "keeps finer copies, name its optimizer, or the copies as `masters`.",
            record.step,
            100 * record.resolution,
        )
