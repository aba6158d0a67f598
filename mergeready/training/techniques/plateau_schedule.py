from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mergeready.errors import OptionError
from mergeready.training.history import History
from mergeready.training.policies import Decision
from mergeready.training.records import ProbeRecord
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch


@register
@dataclass(frozen=True, kw_only=True)
class PlateauSchedule(Technique):
    """Lower the learning rate when the metric stops improving, and stop when that does not help any more.

    After ``patience`` probes without improvement the learning rate is multiplied with ``factor``; after the
    ``reductions``-th time, the next plateau stops the run. Our reconstruction of how arXiv 2506.14126 ends training
    early, per task; its patience and factor are not public. Give the framework a constant learning rate: with another
    schedule, this multiplies it. The framework's own figure of the learning rate does not show it;
    ``mergeready/plateau_schedule/factor`` does.

    As a technique it lowers and stops. Given as ``stop``, it only stops, at the same point of a given history. Both are
    functions of the history, so a resumed run goes on alike. Cost: none beside the probes.

    Attributes:
        on: Whose metric: the ``expert``'s own, or the ``merged`` one of the leading merge method.
        patience: Probes without improvement before each reduction, at least 1.
        factor: In (0, 1).
        reductions: How often to lower before stopping, at least 0.
        min_delta: Smallest change that counts as improvement, in units of the metric.

    Example:
        >>> PlateauSchedule(reductions=1)(History()).stop
        False
    """

    name: ClassVar[str] = "plateau_schedule"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.LEARNING_RATE})
    needs_probes: ClassVar[bool] = True

    on: Literal["expert", "merged"] = "expert"
    patience: int = 2
    factor: float = 0.1
    reductions: int = 1
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.on not in ("expert", "merged"):
            problems.append(f"`on` must be 'expert' or 'merged', not {self.on!r}")
        if self.patience < 1:
            problems.append(f"`patience` must be at least 1, not {self.patience}")
        if not 0 < self.factor < 1:
            problems.append(f"`factor` must be in (0, 1), not {self.factor}")
        if self.reductions < 0:
            problems.append(f"`reductions` must not be negative, not {self.reductions}")
        if not 0 <= self.min_delta < math.inf:
            problems.append(f"`min_delta` must be a number of at least 0, not {self.min_delta}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    def __call__(self, history: History) -> Decision:
        """The policy."""
        count = self.plateaus(history)
        if count > self.reductions:
            return Decision(
                True, f"{self.on} metric: plateau {count}, after {self.reductions} lower learning rates"
            )
        return Decision(False, f"{self.on} metric: {count} plateaus so far")

    def plateaus(self, history: History) -> int:
        """How many plateaus a history has had."""
        count = 0
        for sign, probes in history.groups(merged=self.on == "merged"):
            best, waited = -math.inf, 0
            for value in self._values(probes, history.methods):
                if sign * value > best + self.min_delta:
                    best, waited = sign * value, 0
                    continue
                waited += 1
                if waited == self.patience:
                    waited, count = 0, count + 1
        return count

    def _values(self, probes: Sequence[ProbeRecord], methods: Sequence[str]) -> list[float]:
        if self.on == "expert":
            return [probe.expert.value for probe in probes]
        return [probe.merges[methods[0]].merged for probe in probes if methods[0] in probe.merges]

    def begin(self, run: TechniqueRun) -> Running:
        if not run.probes:
            raise OptionError("plateau_schedule looks at probes: give the run a `probe`.")
        return _Lowering(self)


class _Lowering(Running):
    def __init__(self, settings: PlateauSchedule) -> None:
        self._settings, self._count = settings, 0

    def on_history(self, history: History) -> None:
        self._count = self._settings.plateaus(history)

    def learning_rate_factor(self, step: int) -> float:
        return float(self._settings.factor ** min(self._count, self._settings.reductions))

    def decide(self, history: History) -> Decision:
        return self._settings(history)

    def scalars(self) -> dict[str, float]:
        return {"factor": self.learning_rate_factor(0)}
