"""When to stop: pure functions of the history, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from mergeready.errors import OptionError
from mergeready.training.history import History


@dataclass(frozen=True)
class Decision:
    """Go on or stop, and why."""

    stop: bool
    reason: str


class Policy(Protocol):
    """A function of the history alone, so that a resumed run decides as an uninterrupted one."""

    def __call__(self, history: History) -> Decision:
        """Decide at the newest record."""


@dataclass(frozen=True, kw_only=True)
class MergedPlateau:
    """Stop when the *merged* metric has stopped improving, for every merge method that counts.

    Only merges with the same peers are compared: a run that is resumed with others begins to wait anew.

    Attributes:
        patience: Probes without improvement that are tolerated, at least 1.
        min_delta: Smallest change that counts as improvement, in units of the metric.
        methods: Labels of the merge methods that must have stopped improving; None for all that the newest probe ran.
        min_step: Never stop before this step.
    """

    needs_probes: ClassVar[bool] = True

    patience: int = 3
    min_delta: float = 0.0
    methods: Sequence[str] | None = None
    min_step: int = 0

    def __post_init__(self) -> None:
        _check_plateau(self.patience, self.min_delta)
        if self.methods is not None and (isinstance(self.methods, str) or not self.methods):
            raise OptionError(f"`methods` must be a list of labels, or None for all, not {self.methods!r}.")

    def __call__(self, history: History) -> Decision:
        sign, probes = history.alike(merged=True)
        if not probes:
            return Decision(False, "no probe yet")
        # A run that was resumed with other methods has old ones in its history that can never stop improving.
        probed = [label for label in history.methods if label in probes[-1].merges]
        labels = probed if self.methods is None else list(self.methods)
        unknown = [label for label in labels if label not in probed]
        if unknown:
            raise OptionError(f"`methods` names {unknown}, but the probe runs {probed}.")
        series = {
            label: [(p.step, p.merges[label].merged) for p in probes if label in p.merges] for label in labels
        }
        reasons = []
        for label, points in series.items():
            waited, best_step, best = _since_best(points, sign, self.min_delta)
            if waited < self.patience or points[-1][0] < self.min_step:
                return Decision(
                    False, f"merged with {label} was best at step {best_step}, {waited} probes ago"
                )
            reasons.append(f"{label} has not improved on {best:.4g} (step {best_step}) for {waited} probes")
        return Decision(True, "merged metric: " + "; ".join(reasons))


@dataclass(frozen=True, kw_only=True)
class ExpertPlateau:
    """Stop when the expert's own metric has stopped improving: ordinary early stopping.

    Attributes:
        patience: Probes without improvement that are tolerated, at least 1.
        min_delta: Smallest change that counts as improvement, in units of the metric.
        min_step: Never stop before this step.
    """

    needs_probes: ClassVar[bool] = True

    patience: int = 3
    min_delta: float = 0.0
    min_step: int = 0

    def __post_init__(self) -> None:
        _check_plateau(self.patience, self.min_delta)

    def __call__(self, history: History) -> Decision:
        sign, probes = history.alike(merged=False)
        points = [(probe.step, probe.expert.value) for probe in probes]
        if not points:
            return Decision(False, "no probe yet")
        waited, best_step, best = _since_best(points, sign, self.min_delta)
        stop = waited >= self.patience and points[-1][0] >= self.min_step
        return Decision(stop, f"expert metric was best at step {best_step} ({best:.4g}), {waited} probes ago")


@dataclass(frozen=True, kw_only=True)
class NormBudget:
    """Stop when the task vector has grown past a limit.

    Attributes:
        max_norm: Limit on ‖τ‖, or None.
        max_relative_norm: Limit on ‖τ‖ / ‖θ₀‖ over trained parameters, or None.
    """

    max_norm: float | None = None
    max_relative_norm: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.max_norm, self.max_relative_norm) if limit is not None]
        if not limits or any(not limit > 0 for limit in limits):
            raise OptionError("`NormBudget` needs a positive `max_norm` or `max_relative_norm`.")

    def __call__(self, history: History) -> Decision:
        if not history.metrics:
            return Decision(False, "no measurement yet")
        newest = history.metrics[-1]
        if self.max_norm is not None and newest.norm > self.max_norm:
            return Decision(True, f"‖τ‖ = {newest.norm:.4g} is beyond {self.max_norm:.4g}")
        relative = math.inf if newest.relative_norm is None else newest.relative_norm
        if self.max_relative_norm is not None and relative > self.max_relative_norm:
            return Decision(True, f"‖τ‖/‖θ₀‖ = {relative:.4g} is beyond {self.max_relative_norm:.4g}")
        return Decision(False, f"‖τ‖ = {newest.norm:.4g}")


class AnyOf:
    """Stop as soon as one of several policies says so."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = _check_policies(policies)
        self.needs_probes = all(map(needs_probes, self.policies))

    def __call__(self, history: History) -> Decision:
        decisions = [policy(history) for policy in self.policies]
        stopping = [decision.reason for decision in decisions if decision.stop]
        return Decision(bool(stopping), "; ".join(stopping or [d.reason for d in decisions]))


class AllOf:
    """Stop when all of several policies say so."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = _check_policies(policies)
        self.needs_probes = any(map(needs_probes, self.policies))

    def __call__(self, history: History) -> Decision:
        decisions = [policy(history) for policy in self.policies]
        waiting = [decision.reason for decision in decisions if not decision.stop]
        return Decision(not waiting, "; ".join(waiting or [d.reason for d in decisions]))


def needs_probes(policy: Policy | None) -> bool:
    """Whether a policy can never say stop in a run without probes, as far as it is known: by ``needs_probes``.

    >>> [needs_probes(policy) for policy in (MergedPlateau(), AnyOf(MergedPlateau(), NormBudget(max_norm=1)))]
    [True, False]
    """
    return bool(getattr(policy, "needs_probes", False))


def _check_plateau(patience: int, min_delta: float) -> None:
    if patience < 1:
        raise OptionError(f"`patience` must be at least 1, not {patience}.")
    if not min_delta >= 0:
        raise OptionError(f"`min_delta` must not be negative, not {min_delta}.")


def _check_policies(policies: Sequence[Policy]) -> tuple[Policy, ...]:
    if not policies:
        raise OptionError("name at least one policy.")
    return tuple(policies)


def _since_best(points: Sequence[tuple[int, float]], sign: float, min_delta: float) -> tuple[int, int, float]:
    """Probes since the last improvement, and the step and value of that improvement."""
    best_index, best = 0, sign * points[0][1]
    for index, (_, value) in enumerate(points):
        if sign * value > best + min_delta:
            best_index, best = index, sign * value
    return len(points) - 1 - best_index, points[best_index][0], points[best_index][1]
