from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.training.schedule import Pacer, Schedule

SCHEDULES = st.builds(Schedule, every=st.integers(1, 40), geometric=st.booleans(), first=st.integers(1, 60))


def points(schedule: Schedule, total: int, *, known: bool = True) -> set[int]:
    """The definition as sets: multiples, powers of two below the first multiple, and the last step."""
    wanted = {step for step in range(1, total + 1) if step % schedule.every == 0}
    if schedule.geometric:
        wanted |= {2**e for e in range(20) if 2**e < schedule.every and 2**e <= total}
    return {step for step in wanted if step >= schedule.first} | ({total} if known else set())


@given(schedule=SCHEDULES, total=st.integers(1, 200))
def test_has_is_the_definition(schedule: Schedule, total: int) -> None:
    steps = range(1, total + 1)
    assert {step for step in steps if schedule.has(step, total)} == points(schedule, total)
    assert {step for step in steps if schedule.has(step)} == points(schedule, total, known=False)


@given(schedule=SCHEDULES, total=st.integers(1, 200), step=st.integers(0, 220))
def test_count_after_counts_what_has_says(schedule: Schedule, total: int, step: int) -> None:
    assert schedule.count_after(step, total) == sum(point > step for point in points(schedule, total))


def test_without_the_geometric_start_the_first_is_at_every() -> None:
    schedule = Schedule(every=10, geometric=False)
    assert [step for step in range(1, 25) if schedule.has(step, 24)] == [10, 20, 24]


def test_first_leaves_out_earlier_steps_but_not_the_last() -> None:
    schedule = Schedule(every=32, first=8)
    assert [step for step in range(1, 71) if schedule.has(step, 70)] == [8, 16, 32, 64, 70]
    assert [step for step in range(1, 6) if schedule.has(step, 5)] == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be at least 1, not 0"),
        ({"first": 0}, "`first` must be at least 1, not 0"),
        ({"time_budget": 0.0}, r"`time_budget` must be in \(0, 1\], not 0.0"),
        ({"time_budget": 1.5}, r"`time_budget` must be in \(0, 1\], not 1.5"),
        ({"time_budget": float("nan")}, r"`time_budget` must be in \(0, 1\], not nan"),
    ],
)
def test_ranges(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Schedule(**options)


class Run:
    """A training run in simulated time."""

    def __init__(
        self,
        pacer: Pacer,
        last: int,
        step_time: float = 1.0,
        cost: float = 1.0,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        noise = random.Random(seed)
        self.taken: list[int] = []
        self.trained = 0.0
        self.most_used = 0.0
        for step in range(pacer.first + 1, last + 1):
            self.trained += step_time * noise.uniform(1 - jitter, 1 + jitter)
            if pacer.due(step, self.trained):
                self.taken.append(step)
                pacer.took(cost)
                self.most_used = max(self.most_used, pacer.spent / self.trained)
        self.spent, self.pacer = pacer.spent, pacer


def pacer(every: int = 1, budget: float | None = 0.1, **options: object) -> Pacer:
    return Pacer(Schedule(every=every, time_budget=budget), **options)


TIMES = st.floats(0.01, 10)
COSTS = st.floats(0.001, 200)
BUDGETS = st.floats(0.005, 1)


@given(
    every=st.integers(1, 40),
    budget=BUDGETS,
    cost=COSTS,
    step_time=TIMES,
    total=st.integers(1, 400),
    first=st.integers(0, 200),
    seed=st.integers(0, 100),
)
def test_the_budget_is_kept(
    every: int, budget: float, cost: float, step_time: float, total: int, first: int, seed: int
) -> None:
    """Whatever steps and measurements cost, also on resume, when the first cost is known."""
    paced = pacer(every, budget, total=first + total, first=first, cost=cost)
    run = Run(paced, first + total, step_time, cost, jitter=0.05, seed=seed)
    assert run.spent <= 1.1 * budget * run.trained
    assert len(run.taken) + paced.skipped == Schedule(every=every).count_after(first, first + total)


@given(
    every=st.integers(1, 40),
    budget=BUDGETS,
    cost=COSTS,
    step_time=TIMES,
    last=st.integers(1, 400),
    first=st.integers(0, 200),
)
def test_without_a_known_end_only_passed_time_is_spent(
    every: int, budget: float, cost: float, step_time: float, last: int, first: int
) -> None:
    run = Run(pacer(every, budget, first=first, cost=cost), first + last, step_time, cost)
    assert run.most_used <= budget * (1 + 1e-9)


@given(
    affordable=st.integers(2, 60),
    every=st.integers(1, 8),
    total=st.integers(100, 1000),
    first=st.integers(0, 300),
)
def test_measurements_are_spread_and_the_budget_is_used(
    affordable: int, every: int, total: int, first: int
) -> None:
    """As many as the budget affords (or nearly), the longest wait a few times the even one."""
    scheduled = Schedule(every=every).count_after(first, first + total)
    cost = 0.1 * total / (affordable + 0.5)
    paced = pacer(every, 0.1, total=first + total, first=first, cost=cost)
    run = Run(paced, first + total, cost=cost)
    wanted = min(affordable, scheduled)
    assert wanted / 2 <= len(run.taken) <= wanted
    gaps = [b - a for a, b in zip([first, *run.taken], [*run.taken, first + total], strict=True)]
    assert max(gaps) <= 3 * max(total / wanted, every)


def test_a_tight_budget_leaves_measurements_for_the_second_half() -> None:
    run = Run(pacer(every=1, budget=0.1, total=1000, cost=5.0), 1000, cost=5.0)
    assert len(run.taken) == 20
    assert sum(step <= 500 for step in run.taken) == pytest.approx(10, abs=2)


def test_more_time_than_needed_thins_nothing() -> None:
    run = Run(pacer(every=10, budget=0.5, total=100, cost=0.1), 100, cost=0.1)
    assert run.taken == [1, 2, 4, 8, *range(10, 101, 10)]
    assert run.pacer.skipped == 0


@pytest.mark.parametrize("every", [1, 7, 10])
def test_time_for_exactly_as_many_thins_nothing(every: int) -> None:
    scheduled = Schedule(every=every).count_after(0, 100)
    cost = 0.999 * 0.1 * 100 / scheduled
    run = Run(pacer(every=every, budget=0.1, total=100, cost=cost), 100, cost=cost)
    assert (len(run.taken), run.pacer.skipped) == (scheduled, 0)


def test_what_cannot_be_afforded_is_left_out_and_counted() -> None:
    run = Run(pacer(every=10, budget=0.01, total=100, cost=5.0), 100, cost=5.0)
    assert run.taken == []
    assert run.pacer.skipped == 14


def test_without_a_budget_every_scheduled_step_is_measured() -> None:
    run = Run(pacer(every=10, budget=None, total=35, cost=1e9), 35, cost=1e9)
    assert run.taken == [1, 2, 4, 8, 10, 20, 30, 35]


def test_without_a_known_cost_the_first_scheduled_step_tells_it() -> None:
    paced = pacer(every=10, budget=0.01, total=100)
    run = Run(paced, 100, cost=50.0)
    assert run.taken == [1]
    assert (paced.spent, paced.cost) == (50.0, 50.0)


def test_time_spent_before_the_run_counts() -> None:
    free = Run(pacer(every=10, budget=0.1, total=100, cost=1.0), 100)
    charged = Run(pacer(every=10, budget=0.1, total=100, cost=1.0, spent=6.0), 100)
    assert charged.spent <= 10
    assert len(charged.taken) < len(free.taken)


def test_the_newest_cost_counts() -> None:
    paced = pacer(every=1, budget=0.5, total=100, cost=0.01)
    assert paced.due(1, 1.0)
    paced.took(60.0)  # more than half of all training time
    assert not any(paced.due(step, float(step)) for step in range(2, 101))
