from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from mergeready.training.finish import FinishedRun
from mergeready.validation import share

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

# The same examples at every run, few enough for a quick suite; --hypothesis-profile=thorough looks further.
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=1000, database=None)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _no_reports_of_runs() -> Iterator[Callable[[FinishedRun], None]]:
    """Reports on picks take a second each, and hundreds of tests, and fixtures of whole modules, train something."""
    with pytest.MonkeyPatch.context() as patch:
        real = share.share_run
        patch.setattr(share, "share_run", None)
        yield real


@pytest.fixture
def sharing(_no_reports_of_runs: Callable[[FinishedRun], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which runs end as they do for users."""
    monkeypatch.setattr(share, "share_run", _no_reports_of_runs)
