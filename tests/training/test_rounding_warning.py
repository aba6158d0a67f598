from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from mergeready.training.history import History
from mergeready.training.records import MetricsRecord
from mergeready.training.rounding_warning import WORTH_SAYING, warn_of_rounding
from tests.training.histories import metrics


def record(step: int, resolution: float | None) -> MetricsRecord:
    return replace(metrics(step, 1.0), resolution=resolution)


@pytest.mark.parametrize(
    ("before", "resolution", "said"),
    [
        ([], None, False),
        ([], WORTH_SAYING, False),
        ([], 0.5, True),
        ([None], 0.5, True),
        ([0.3], 0.5, False),  # once is enough
    ],
)
def test_it_is_said_once_and_where_it_matters(
    before: list[float | None], resolution: float | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    history = History([record(step, value) for step, value in enumerate(before, 1)])
    with caplog.at_level(logging.WARNING, logger="mergeready"):
        warn_of_rounding(record(9, resolution), history)
    assert ("rounding alone would give 50 %" in caplog.text) is said
