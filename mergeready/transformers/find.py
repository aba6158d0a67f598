from __future__ import annotations

import sys

from transformers import Trainer, TrainerCallback

from mergeready.errors import OptionError


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose event is being handled.

    Trainer hands its callbacks everything but itself, while logging and evaluation need it. It is a few frames
    up the stack, since an event is a plain chain of method calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise OptionError("the Trainer of this callback cannot be found; call `callback.attach(trainer)`.")
