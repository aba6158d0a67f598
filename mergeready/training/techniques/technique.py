"""What a technique is: settings that say what they touch, and what acts in one run."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from mergeready.training.history import History
from mergeready.training.policies import Decision
from mergeready.training.techniques.run import TechniqueRun


class Touch(Enum):
    """What a technique may change. Each shell maps each of them to its framework once, in this order within a step."""

    TRAINABLE = "which parameters train"
    INITIALISATION = "the weights before the first step"
    FORWARD = "the weights during forward and backward"
    EXTRA_GRADIENT = "an extra loss or gradient"
    GRADIENTS = "the gradients before clipping"
    LEARNING_RATE = "the learning rate"
    WEIGHTS = "the weights after the step"
    EVALUATED = "the weights that probes measure and picks keep"
    END = "the weights at the end of training"


ALONE = frozenset({Touch.INITIALISATION, Touch.FORWARD, Touch.LEARNING_RATE, Touch.EVALUATED, Touch.END})
"""What only one technique of a run may touch: a second one would undo the first, or act on what it did not expect."""

NEEDS_OPTIMIZER = frozenset({Touch.LEARNING_RATE, Touch.WEIGHTS, Touch.EVALUATED})
"""What is done in the optimizer's hooks."""


class Running:
    """A technique at work in one run. A technique overrides what it declares to touch; the rest does nothing.

    Steps are counted from 1: ``step`` is the one that is being taken.
    """

    def wants_gradient(self, step: int) -> bool:
        """Whether forward and backward run once at the unchanged weights before :meth:`moved` is asked.

        The gradient of all that the step sees, averaged over ranks, is then in ``.grad``; it is thrown away afterwards.
        """
        return False

    def moved(self, step: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Pairs of a local tensor of the model and the values it has during forward and backward.

        Each tensor is written before the next pair is asked for, and restored bit for bit later. Several calls within
        one step, for micro-batches of gradient accumulation, must give the same values.
        """
        return ()

    def add_gradients(self, step: int, factor: float) -> None:
        """Add to ``.grad``, times ``factor``, which is that of a gradient scaler; after the last backward of a step."""

    def edit_gradients(self, step: int) -> None:
        """Change ``.grad``, which is averaged over ranks, before it is clipped. It may be scaled by a constant."""

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied with in this step."""
        return 1.0

    def after_update(self, step: int) -> None:
        """Right after the optimizer's update; the learning rate is still that of the step."""

    def shown(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Pairs of a local tensor of the model and the values that probes, measurements and picks see."""
        return ()

    def decide(self, history: History) -> Decision:
        """Whether the technique wants the run to stop; a pure function of the history."""
        return Decision(False, "")

    def on_history(self, history: History) -> None:
        """After records were added, and once at the start of a resumed run."""

    def finish(self) -> None:
        """At the end of training."""

    def scalars(self) -> Mapping[str, float]:
        """Figures for the loggers, without a prefix; looked at when something is measured."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and cannot compute again: numbers and text, JSON-ready, and small."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs, whole; a collective where the model is sharded."""
        return {}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` and :meth:`tensors` gave."""


class Technique(ABC):
    """Something that changes training so that the expert merges better: a frozen dataclass of settings.

    To write one: a file in ``training/techniques/`` with a class that has a ``name``, says what it ``touches``, checks
    its settings in ``__post_init__``, and whose :meth:`begin` gives the object that acts in a run; ``@register``.
    """

    name: ClassVar[str]
    """What settings files call it."""

    touches: ClassVar[frozenset[Touch]]
    """What it changes."""

    @property
    def is_off(self) -> bool:
        """Whether the settings ask for nothing. Training is bit-identical then to training without the technique."""
        return False

    def prepare(self, model: nn.Module, *, step: int) -> None:  # noqa: B027 - most have nothing to prepare
        """Before the run is bound to the model: choose parameters, initialise. ``step`` is greater than 0 on resume."""

    @abstractmethod
    def begin(self, run: TechniqueRun) -> Running:
        """Bind to a run. Raises where the run cannot serve the technique; changes nothing."""

    def conflict(self, other: Technique) -> str | None:
        """Why it cannot be used together with another technique, beside what both declare to touch."""
        return None

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON has them, for records; of an object, what kind it is."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every technique is a dataclass
        settings = {field.name: getattr(self, field.name) for field in fields}
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        return {"technique": self.name} | plain
