from __future__ import annotations

import math
from dataclasses import dataclass, field

from mergeready.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """At which training steps to measure: 1, 2, 4, 8, … at first, then every ``every`` steps, and the last one.

    Attributes:
        every: Steps between measurements once the geometric start has reached it.
        geometric: Whether to measure at powers of two before that. The best moment to stop can be very early.
        first: First step to measure at.
        time_budget: Share of the training time that measuring may take, in (0, 1]; None for no limit. Later
            measurements are thinned to keep it. A limit makes the choice of steps depend on the clock.
    """

    every: int = 100
    geometric: bool = True
    first: int = 1
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise OptionError(f"`every` must be at least 1, not {self.every}.")
        if self.first < 1:
            raise OptionError(f"`first` must be at least 1, not {self.first}.")
        if self.time_budget is not None and not 0 < self.time_budget <= 1:
            raise OptionError(f"`time_budget` must be in (0, 1], not {self.time_budget}.")

    def has(self, step: int, total: int | None = None) -> bool:
        """Whether a step (counted from 1) is on the schedule of a run of ``total`` steps.

        >>> [step for step in range(1, 30) if Schedule(every=10).has(step, total=29)]
        [1, 2, 4, 8, 10, 20, 29]
        """
        if step < self.first:
            return step == total
        power_of_two = step & (step - 1) == 0
        return (
            step % self.every == 0 or (self.geometric and power_of_two and step < self.every) or step == total
        )

    def count_after(self, step: int, total: int) -> int:
        """Number of scheduled steps after a step.

        >>> Schedule(every=10).count_after(8, total=29)
        3
        """
        if step >= total:
            return 0
        before = max(step, self.first - 1)
        regular = max(total // self.every - before // self.every, 0)
        powers = (
            [1 << exponent for exponent in range((self.every - 1).bit_length())] if self.geometric else []
        )
        early = sum(before < power <= total for power in powers)
        return regular + early + (not self.has(total))  # the last step is on the schedule in any case


@dataclass
class Pacer:
    """Decides, step by step, which scheduled measurements the time budget affords.

    Attributes:
        schedule: The schedule.
        total: The last step of the run, if known.
        first: Steps that had been taken when measuring of time began.
        spent: Seconds spent on measuring so far.
        cost: Seconds that the last measurement took, or an estimate before the first.
    """

    schedule: Schedule
    total: int | None = None
    first: int = 0
    spent: float = 0.0
    cost: float | None = None
    skipped: int = 0
    _since_last: int = field(default=0)

    def on_schedule(self, step: int, after: int | None = None) -> bool:
        """Whether a measurement is planned for this step, if there is time.

        Args:
            step: The step.
            after: The step that was seen before it, the one before by default. Those between count as well.
        """
        first = step if after is None else min(after + 1, step)
        return any(self.schedule.has(each, self.total) for each in range(first, step + 1))

    def due(self, step: int, train_seconds: float, after: int | None = None) -> bool:
        """Whether to measure now.

        Args:
            step: The step that was just taken, counted from 1.
            train_seconds: Seconds of training since step ``first``, without measuring.
            after: As ``on_schedule`` takes it.
        """
        if not self.on_schedule(step, after):
            return False
        self._since_last += 1
        if self.schedule.time_budget is None or self.cost is None or self._affords(step, train_seconds):
            self._since_last = 0
            return True
        self.skipped += 1
        return False

    def _affords(self, step: int, train_seconds: float) -> bool:
        budget, cost = self.schedule.time_budget, self.cost
        if budget is None or cost is None:
            return True
        if self.total is None:  # without an end, only time that has passed can be spent
            return self.spent + cost <= budget * train_seconds
        expected = train_seconds / max(step - self.first, 1) * (self.total - self.first)
        affordable = math.floor((budget * expected - self.spent) / max(cost, 1e-9))
        if affordable < 1:
            return False
        left = 1 + self.schedule.count_after(step, self.total)
        return self._since_last >= math.ceil(left / affordable)

    def took(self, seconds: float) -> None:
        """Note what a measurement cost."""
        self.spent += seconds
        self.cost = seconds
