"""What a study trains on: a base, and tasks with their data and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mergeready.errors import OptionError, listing
from mergeready.merging.evaluation import Evaluate
from mergeready.study.settings import SuiteSettings
from mergeready.targets import call_target


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyTask:
    """One task of a study.

    Attributes:
        train: Training examples.
        collate: Makes a batch from a list of examples.
        loss: Mean loss of a model on a batch.
        validation: Evaluation that scales and checkpoints are chosen with.
        test: Evaluation that is reported, and that nothing is chosen with. Give numbers by example for intervals.
        extra: Further evaluations to report, such as accuracy on examples with wrong labels.
    """

    train: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    validation: Evaluate
    test: Evaluate
    extra: Mapping[str, Evaluate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudySuite:
    """A base and the tasks of one seed.

    Attributes:
        model: Makes a model with the base's weights, the same ones at every call; what stays frozen has
            ``requires_grad`` off. Heads of tasks belong into the tasks, since models are merged as they are.
        tasks: Tasks by name.
        given: What settings of techniques can ask for as ``suite:NAME``: functions of a task's name, such as one that
            returns the other tasks' Kronecker factors.
    """

    model: Callable[[], nn.Module]
    tasks: Mapping[str, StudyTask]
    given: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


def open_suite(settings: SuiteSettings, seed: int) -> StudySuite:
    """Call a suite's target. Modules are looked up as Python does, and in the working directory.

    Raises:
        OptionError: If there is no such function, it does not take these arguments, or returns something else.
    """
    name = settings.target
    suite = call_target(name, "suite.target", {"seed": seed, **settings.arguments})
    if not isinstance(suite, StudySuite):
        raise OptionError(f"`suite.target` {name} must return a StudySuite, not a {type(suite).__name__}.")
    return suite


def choose_tasks(suite: StudySuite, names: Sequence[str] | None) -> dict[str, StudyTask]:
    """The tasks of a study, in its order.

    Raises:
        OptionError: If one is unknown or has no training examples, or fewer than two remain.
    """
    chosen = list(suite.tasks) if names is None else list(names)
    unknown = [name for name in chosen if name not in suite.tasks]
    if unknown:
        raise OptionError(f"`tasks` names {listing(unknown)}; the suite has {listing(suite.tasks)}.")
    if len(chosen) < 2:
        raise OptionError(f"a study merges at least two tasks; `tasks` has {listing(chosen) or 'none'}.")
    empty = [name for name in chosen if len(suite.tasks[name].train) == 0]
    if empty:
        raise OptionError(f"there are no training examples for {listing(empty)}.")
    return {name: suite.tasks[name] for name in chosen}
