from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mergeready.errors import OptionError
from mergeready.training.techniques.technique import Technique, Touch


@dataclass(frozen=True, kw_only=True)
class Penalty(Technique):
    """A term that joins the loss, by its gradient: what all penalties share.

    Attributes:
        strength: λ, at least 0; 0 switches it off.
    """

    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.EXTRA_GRADIENT})

    strength: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise OptionError(f"`strength` must be a number of at least 0, not {self.strength}.")

    @property
    def is_off(self) -> bool:
        return self.strength == 0
