"""What a check is and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from mergeready.validation.subject import Subject

Level: TypeAlias = Literal["file", "base", "behaviour", "composition"]
Severity: TypeAlias = Literal["error", "warning", "info"]
Status: TypeAlias = Literal["passed", "failed", "not checked"]

Cost: TypeAlias = Literal["headers", "values", "passes"]
"""What a check reads: names and shapes, every value of a file, or a model's answers."""

LEVELS: tuple[Level, ...] = ("file", "base", "behaviour", "composition")
_COSTS: tuple[Cost, ...] = ("headers", "values", "passes")
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

Limits: TypeAlias = Mapping[str, float]
"""Thresholds of one check, by name."""

COULD_NOT_RUN = "could not run: "
"""What a message begins with where a check has what it needs, and something else broke."""


class NotCheckedError(Exception):
    """Raised where a check lacks something: the message says what."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a check found.

    Attributes:
        passed: Whether all is well.
        message: One sentence, with the figures.
        value: The figure that counts, if there is one.
        threshold: What it was compared with.
        where: Names of the offending tensors, modules or files.
        fix: What to do about this one, where the check's own words do not fit.
        severity: How bad this one is, where that is not as bad as the check's worst.
    """

    passed: bool
    message: str
    value: float | None = None
    threshold: float | None = None
    where: tuple[str, ...] = ()
    fix: str | None = None
    severity: Severity | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to be checked.

    Attributes:
        id: Letter and number, stable for ever.
        level: What it needs: the files alone, the base, forward passes, or other experts.
        severity: How bad a failure is.
        title: What holds when it passes.
        fix: What to do when it does not.
        run: Looks at the subject with the check's own thresholds.
        cost: What it reads.
    """

    id: str
    level: Level
    severity: Severity
    title: str
    fix: str
    run: Callable[[Subject, Limits], Result]
    cost: Cost = "headers"

    @property
    def order(self) -> tuple[int, int, str]:
        """By level, within one from cheap to dear, then by id."""
        return LEVELS.index(self.level), _COSTS.index(self.cost), self.id


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A check's outcome in a report; *not checked* is an outcome of its own, and never counts as passed."""

    id: str
    level: Level
    severity: Severity
    title: str
    status: Status
    message: str
    fix: str = ""
    value: float | None = None
    threshold: float | None = None
    where: tuple[str, ...] = field(default=())

    @property
    def could_not_run(self) -> bool:
        """Whether something broke, as a base that does not open; not whether something is lacking."""
        return self.status == "not checked" and self.message.startswith(COULD_NOT_RUN)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"where": list(self.where)}


CHECKS: list[Check] = []
"""All checks, in the order in which they are run: by level, and within one from cheap to dear."""


def check(
    id: str,  # noqa: A002 - the field's word
    level: Level,
    severity: Severity,
    title: str,
    *,
    fix: str,
    cost: Cost = "headers",
) -> Callable[[Callable[[Subject, Limits], Result]], Callable[[Subject, Limits], Result]]:
    """Register a function as a check. Use as a decorator."""

    def register(run: Callable[[Subject, Limits], Result]) -> Callable[[Subject, Limits], Result]:
        if any(known.id == id for known in CHECKS):
            raise ValueError(f"two checks are called {id}.")
        CHECKS.append(Check(id=id, level=level, severity=severity, title=title, fix=fix, run=run, cost=cost))
        CHECKS.sort(key=lambda known: known.order)
        return run

    return register


def passed(message: str, *, value: float | None = None, threshold: float | None = None) -> Result:
    """All is well."""
    return Result(passed=True, message=message, value=value, threshold=threshold)


def failed(
    message: str,
    *,
    where: tuple[str, ...] = (),
    value: float | None = None,
    threshold: float | None = None,
    fix: str | None = None,
    severity: Severity | None = None,
) -> Result:
    """Something is wrong."""
    return Result(
        passed=False,
        message=message,
        where=where,
        value=value,
        threshold=threshold,
        fix=fix,
        severity=severity,
    )


def compared(
    holds: bool,
    message: str,
    *,
    where: tuple[str, ...] = (),
    value: float | None = None,
    threshold: float | None = None,
) -> Result:
    """Whether a value keeps to its threshold, with the same words and figures either way.

    State what holds, so that a value that is no number fails.
    """
    return Result(
        passed=holds, message=message, where=() if holds else where, value=value, threshold=threshold
    )
