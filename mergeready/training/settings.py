"""A run's settings as plain data, for trainers that are configured in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergeready.errors import OptionError
from mergeready.merging.method import MergeMethod
from mergeready.merging.registry import make_method
from mergeready.targets import find_target
from mergeready.training.difficulty.tracker import Difficulty
from mergeready.training.monitor import DEFAULT_MEASURE
from mergeready.training.options import MonitorOptions
from mergeready.training.picks import Picks
from mergeready.training.policies import AnyOf, ExpertPlateau, MergedPlateau, NormBudget, Policy
from mergeready.training.probe import Probe
from mergeready.training.schedule import Schedule
from mergeready.training.techniques.plateau_schedule import PlateauSchedule
from mergeready.training.techniques.registry import make_technique
from mergeready.training.techniques.technique_set import TechniqueSet

_STRICT = ConfigDict(extra="forbid", frozen=True)


class StopSettings(BaseModel):
    """When to stop: as soon as one of the policies that are given says so."""

    model_config = _STRICT

    merged_plateau: MergedPlateau | None = None
    expert_plateau: ExpertPlateau | None = None
    norm_budget: NormBudget | None = None
    plateau_schedule: PlateauSchedule | None = None

    def policy(self) -> Policy | None:
        """The policies as one; None where none is given."""
        named = (self.merged_plateau, self.expert_plateau, self.norm_budget, self.plateau_schedule)
        given = [policy for policy in named if policy is not None]
        return AnyOf(*given) if given else None


class ProbeSettings(BaseModel):
    """How to probe; see :class:`~mergeready.training.probe.Probe`.

    Attributes:
        merge: Names of merge methods, or a name with its parameters: ``{ties: {density: 0.2}}``.
        evaluate: Where the evaluation function is: ``package.module:function``. By default the trainer evaluates.
    """

    model_config = _STRICT

    merge: list[str | dict[str, dict[str, Any]]] = Field(default=["task_arithmetic"], min_length=1)
    scales: tuple[float, ...] = tuple(Probe().scales)
    evaluate: str | None = None
    metric: str | None = None
    greater_is_better: bool | None = None
    schedule: Schedule = Probe().schedule
    max_evaluations: int = Probe().max_evaluations

    @field_validator("merge")
    @classmethod
    def _known(cls, merge: list[str | dict[str, dict[str, Any]]]) -> list[str | dict[str, dict[str, Any]]]:
        for given in merge:
            merge_method(given)
        return merge

    def probe(self) -> Probe:
        """The probe.

        Raises:
            OptionError: If the evaluation function cannot be found.
        """
        return Probe(
            merge=[merge_method(given) for given in self.merge],
            scales=self.scales,
            evaluate=None if self.evaluate is None else find_target(self.evaluate, "evaluate"),
            metric=self.metric,
            greater_is_better=self.greater_is_better,
            schedule=self.schedule,
            max_evaluations=self.max_evaluations,
        )


class RunSettings(BaseModel):
    """What a callback is told, as plain data.

    Attributes:
        base: Folder or hub id of the base; None where it can be found out.
        peers: Folders, hub ids or fingerprints of other experts.
        probe: How to probe; False to only measure the task vector.
        stop: When to stop.
        on_stop: ``stop``, or ``record`` to only note when the run would have stopped.
        measure: When to measure the task vector.
        sampled_every: Steps between estimates from sampled coordinates; None for none.
        picks: Which checkpoints to keep; False for none.
        techniques: Names of techniques, or a name with its settings: ``{simulated_merge: {every: 4}}``.
        difficulty: Whether, or how, to track which examples are hard.
        share: Whether fingerprint, report and card are written beside them at the end.

    Example:
        >>> settings = RunSettings.parse({
        ...     "peers": ["experts/math"],
        ...     "probe": {"merge": ["ties", {"dare_ties": {"density": 0.3}}], "schedule": {"every": 50}},
        ...     "stop": {"merged_plateau": {"patience": 4}},
        ... })
        >>> settings.options()["probe"].schedule.every
        50
    """

    model_config = _STRICT

    base: str | None = None
    peers: list[str] = []
    probe: ProbeSettings | Literal[False] = ProbeSettings()
    stop: StopSettings = StopSettings()
    on_stop: Literal["stop", "record"] = "stop"
    measure: Schedule = DEFAULT_MEASURE
    sampled_every: int | None = Field(default=None, ge=1)
    picks: Picks | Literal[False] = Picks()
    techniques: list[str | dict[str, dict[str, Any]]] = []
    difficulty: bool | Difficulty = False
    share: bool = True

    @field_validator("techniques")
    @classmethod
    def _usable(
        cls, techniques: list[str | dict[str, dict[str, Any]]]
    ) -> list[str | dict[str, dict[str, Any]]]:
        TechniqueSet(techniques)
        return techniques

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> RunSettings:
        """Check settings as read from a file.

        Raises:
            OptionError: If a name or value is not understood; the message lists all of them.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise OptionError(f"the mergeready settings cannot be understood: {error}") from error

    def options(self) -> MonitorOptions:
        """The same as arguments of a callback.

        Raises:
            OptionError: If the evaluation function cannot be found.
        """
        options: MonitorOptions = {
            "base": self.base,
            "peers": self.peers,
            "probe": self.probe.probe() if self.probe else None,
            "stop": self.stop.policy(),
            "on_stop": self.on_stop,
            "measure": self.measure,
            "sampled_every": self.sampled_every,
            "picks": self.picks or None,
            "techniques": [make_technique(given) for given in self.techniques],
            "difficulty": self.difficulty or None,
        }
        if not self.share:
            options["share"] = None
        return options


def merge_method(given: str | dict[str, dict[str, Any]]) -> MergeMethod:
    """A merge method as settings name it: its name, or its name with parameters.

    Raises:
        OptionError: If there is no such method or parameter.

    >>> merge_method({"ties": {"density": 0.3}}).name
    'ties'
    """
    if isinstance(given, str):
        return make_method(given)
    if len(given) != 1:
        raise OptionError(f"`merge` takes one method an entry, not {', '.join(given) or 'none'}.")
    [(name, parameters)] = given.items()
    return make_method(name, **parameters)
