"""Libraries that say less, so that a run's own figures can be read."""

from __future__ import annotations

import datasets
import transformers


def quieten_libraries() -> None:
    """Turn off bars and notes about loading; the Trainer's log stays."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
