from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from mergeready.errors import OptionError
from mergeready.training.techniques.technique import Running, Technique, Touch


@dataclass(frozen=True, kw_only=True)
class Penalty(Technique):
    """A term that joins the loss, by its gradient: what all penalties share.

    A costly one need not join at every step: added every k-th step, and k times as strong, its mean over steps stays
    ("lazy regularization", Karras et al., arXiv 1912.04958, appendix B). Adam's second moments do see it come and go.

    Attributes:
        strength: λ, at least 0; 0 switches it off.
        every: k, at least 1.
    """

    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.EXTRA_GRADIENT})

    strength: float
    every: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.strength) and self.strength >= 0):
            problems.append(f"`strength` must be a number of at least 0, not {self.strength}")
        if self.every < 1:
            problems.append(f"`every` must be at least 1, not {self.every}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @property
    def is_off(self) -> bool:
        return self.strength == 0


class RunningPenalty(Running):
    """A penalty at work: adds its gradient at the steps at which that is due.

    Args:
        settings: The penalty.
    """

    def __init__(self, settings: Penalty) -> None:
        self._settings = settings

    def add_gradients(self, step: int, factor: float) -> None:
        settings = self._settings
        if step % settings.every == 0:
            self.add(step // settings.every - 1, settings.strength * settings.every * factor)

    @abstractmethod
    def add(self, turn: int, strength: float) -> None:
        """Add the gradient of R to ``.grad``.

        Args:
            turn: How many times it was added before, resumed runs included.
            strength: What it is multiplied with.
        """
