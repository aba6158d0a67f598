"""Numbers of a study, with intervals over seeds and over examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from mergeready.merging.evaluation import is_greater_better
from mergeready.study.cells import EXPERT, Cell
from mergeready.training.records import Estimate

RESAMPLES = 1000
Contents = Mapping[Cell, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Sample:
    """One figure of a study before averaging: every example of every task for every seed.

    Attributes:
        values: Task to an array, seeds × examples.
    """

    values: Mapping[str, NDArray[np.float64]]

    @property
    def by_seed(self) -> NDArray[np.float64]:
        """Mean over tasks, which count alike, for each seed."""
        means: NDArray[np.float64] = np.mean([values.mean(axis=1) for values in self.values.values()], axis=0)
        return means

    @property
    def value(self) -> float:
        """Mean over tasks and seeds."""
        return float(self.by_seed.mean())

    def minus(self, other: Sample) -> Sample:
        """The difference, example by example where both were measured on the same ones.

        Raises:
            ValueError: If tasks, seeds or examples differ.
        """
        if set(self.values) != set(other.values):
            raise ValueError("two samples of different tasks cannot be paired")
        return Sample({task: values - other.values[task] for task, values in self.values.items()})

    def over_seeds(self) -> Estimate:
        """Mean with its 95 % t interval over seeds; without an interval for one seed.

        >>> sample = Sample({"a": np.array([[1.0, 0.0], [1.0, 1.0]])})
        >>> estimate = sample.over_seeds()
        >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2)
        (0.75, -2.43, 3.93)
        """
        means = self.by_seed
        if len(means) < 2:
            return Estimate(value=self.value)
        half = float(stdtrit(len(means) - 1, 0.975)) * float(means.std(ddof=1)) / len(means) ** 0.5
        return Estimate(value=self.value, n=len(means), low=self.value - half, high=self.value + half)

    def over_examples(self) -> Estimate:
        """Mean with its 95 % bootstrap interval over each task's examples, seeds held fixed."""
        rng = np.random.default_rng(0)
        draws = np.zeros(RESAMPLES)
        for values in self.values.values():
            column = values.mean(axis=0)
            draws += column[rng.integers(0, len(column), (RESAMPLES, len(column)))].mean(axis=1)
        low, high = np.quantile(draws / len(self.values), [0.025, 0.975])
        return Estimate(value=self.value, low=float(low), high=float(high))

    def estimate(self) -> Estimate:
        """With the interval over seeds where there are several, else over examples."""
        over_seeds = self.over_seeds()
        return self.over_examples() if over_seeds.low is None else over_seeds


class Results:
    """The cells of a study, to be asked for figures.

    Args:
        contents: Every cell that is there.

    Attributes:
        contents: The cells.
        metric: The metric's name.
        sign: 1 where more is better, else −1.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.metric = str(next(iter(contents.values()))["metric"]) if contents else "metric"
        self.sign = 1.0 if is_greater_better(self.metric) else -1.0

    def labels(self, field: str) -> list[Any]:
        """What cells have as ``arm``, ``at``, ``method``, ``seed`` or ``count``, in order of appearance; steps rise."""
        found = list(dict.fromkeys(getattr(cell, field) for cell in self.contents))
        return (
            sorted(found, key=lambda at: (not at.isdigit(), int(at) if at.isdigit() else 0))
            if field == "at"
            else found
        )

    def steps(self, arm: str) -> list[int]:
        """The steps at which an arm has cells, rising."""
        return sorted({int(cell.at) for cell in self.contents if cell.arm == arm and cell.at.isdigit()})

    def cells(self, arm: str, at: str | int, method: str, count: int | None = None) -> list[Cell]:
        """One cell a seed; of the largest number of experts if none is given."""
        found = [c for c in self.contents if (c.arm, c.at, c.method) == (arm, str(at), method)]
        wanted = max((c.count for c in found), default=0) if count is None else count
        return sorted((c for c in found if c.count == wanted), key=lambda c: c.seed)

    def sample(
        self,
        arm: str,
        at: str | int,
        method: str,
        *,
        count: int | None = None,
        seeds: Sequence[int] | None = None,
        extra: str | None = None,
    ) -> Sample | None:
        """Test values, or those of a further evaluation; None where there is no cell."""
        cells = [c for c in self.cells(arm, at, method, count) if seeds is None or c.seed in seeds]
        return _stack([self.contents[cell]["tasks"] for cell in cells], extra)

    def base(self, arm: str, at: str | int) -> Sample | None:
        """Test values of the base."""
        return _stack([self.contents[cell]["base"] for cell in self.cells(arm, at, EXPERT)], None)

    def difference(
        self, one: tuple[str, str | int, str], two: tuple[str, str | int, str], **options: Any
    ) -> Sample | None:
        """First − second, each (arm, at, method), over the seeds that both have."""
        seeds = [{cell.seed for cell in self.cells(*place, options.get("count"))} for place in (one, two)]
        common = sorted(seeds[0] & seeds[1])
        first, second = (self.sample(*place, seeds=common, **options) for place in (one, two))
        return None if first is None or second is None else first.minus(second)

    def validation(self, arm: str, at: str | int, method: str, count: int | None = None) -> float | None:
        """Mean validation metric over tasks and seeds."""
        cells = self.cells(arm, at, method, count)
        values = [task["validation"] for cell in cells for task in self.contents[cell]["tasks"].values()]
        return float(np.mean(values)) if values else None

    def best_step(self, arm: str, method: str, count: int | None = None) -> int | None:
        """The step whose validation metric is best, the earliest of equals; by validation data alone."""
        values = {step: self.validation(arm, step, method, count) for step in self.steps(arm)}
        known = {step: self.sign * value for step, value in values.items() if value is not None}
        return max(known, key=lambda step: (known[step], -step)) if known else None

    def scales(self, arm: str, at: str | int, method: str) -> list[tuple[float, bool]]:
        """Scale, and whether the optimum was inside what was tried, for each seed."""
        return [
            (float(self.contents[cell]["scale"]), bool(self.contents[cell]["inside"]))
            for cell in self.cells(arm, at, method)
            if "scale" in self.contents[cell]
        ]

    def training_seconds(self, arm: str) -> float | None:
        """Mean CPU seconds of one training run of an arm."""
        runs = {
            (cell.seed, task): run["cpu_seconds"]
            for cell, content in self.contents.items()
            if cell.arm == arm
            for task, run in content.get("runs", {}).items()
        }
        return float(np.mean(list(runs.values()))) if runs else None

    def merging_seconds(self) -> float:
        """CPU seconds that merging, tuning and testing took in all."""
        return float(sum(content.get("cpu_seconds", 0.0) for content in self.contents.values()))


def _stack(contents: Sequence[Mapping[str, Any]], extra: str | None) -> Sample | None:
    if not contents:
        return None

    def values(result: Mapping[str, Any]) -> Any:
        return result["test"] if extra is None else result["extra"].get(extra)

    tasks = [task for task in contents[0] if values(contents[0][task])]
    if not tasks:
        return None
    return Sample(
        {task: np.array([values(content[task]) for content in contents], dtype=np.float64) for task in tasks}
    )
