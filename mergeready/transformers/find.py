from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from transformers import Trainer, TrainerCallback


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer whose event is being handled; None where it hides itself.

    Trainer hands its callbacks everything but itself, while logging and evaluation need it. It is a few frames
    up the stack, since an event is a plain chain of method calls.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back
    return None


def resumed_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint that a Trainer, whose event is being handled, resumes from; None where that cannot be seen.

    It may lie anywhere, and the Trainer tells it to its own methods only.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(found, str | Path):
            return Path(found)
        frame = frame.f_back
    return None
