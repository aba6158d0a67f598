"""The schema of a study file, and errors that name the key and the fix."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergeready.errors import OptionError
from mergeready.merging import MergeMethod, make_method
from mergeready.merging.scale_search import check_scales
from mergeready.merging.tune import FIRST_SCALES, MAX_EVALUATIONS
from mergeready.training.techniques.technique_set import TechniqueSet
from mergeready.weights.yaml_text import read_yaml

_Positive = Annotated[int, Field(ge=1)]
_PositiveFloat = Annotated[float, Field(gt=0)]
_NAME = re.compile(r"[\w.+-]+")
_RESERVED = ("method", "scales", "tune")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SuiteSettings(_Settings):
    """Where model and tasks come from.

    Attributes:
        target: ``module:function``, called with ``seed`` and the arguments; returns a ``StudySuite``.
        arguments: Further keyword arguments.
    """

    target: str
    arguments: dict[str, Any] = {}


class RateSettings(_Settings):
    """How the learning rate goes over a run.

    Attributes:
        kind: ``constant``, ``linear`` or ``cosine`` to zero at the last step, or ``plateau``: times ``factor`` when
            the validation metric has not improved for ``patience`` evaluations, as torch's ``ReduceLROnPlateau`` does.
        warmup_steps: Steps of linear warm-up.
        factor: For ``plateau``.
        patience: For ``plateau``, in evaluations.
    """

    kind: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: Annotated[int, Field(ge=0)] = 1


class StopSettings(_Settings):
    """Ordinary early stopping: end the run when the expert's validation metric has stopped improving.

    Attributes:
        patience: Evaluations without improvement that are tolerated.
        min_delta: Smallest change that counts as improvement.
    """

    patience: _Positive = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class AdapterSettings(_Settings):
    """Train a LoRA adapter instead of the weights.

    Attributes:
        rank: Its rank.
        alpha: Its alpha; twice the rank by default.
        targets: Modules to adapt, as PEFT's ``target_modules``.
        shared_init: Whether all tasks of a seed start from the same factors.
    """

    rank: _Positive = 8
    alpha: _PositiveFloat | None = None
    targets: str | list[str] = "all-linear"
    shared_init: bool = True


class Arm(_Settings):
    """One way to train experts.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Its weight decay.
        batch_size: Examples a step.
        clip_norm: Largest norm of a gradient, or None.
        precision: ``float32``, or ``bfloat16`` for autocast in training.
        schedule: How the learning rate goes.
        evaluate_every: Steps between evaluations for ``stop`` and a ``plateau`` schedule.
        stop: When to end early, or None.
        adapter: Train a LoRA adapter, or None for the weights.
        techniques: Techniques by name, or ``{name: settings}``, in which ``suite:NAME`` stands for what the suite gives
            for a task.
        checkpoints: Experts that were trained elsewhere, in place of training: a path with ``{task}``, ``{seed}`` and
            ``{step}``, where ``*`` matches anything.
    """

    learning_rate: _PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: _Positive = 32
    clip_norm: _PositiveFloat | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    schedule: RateSettings = RateSettings()
    evaluate_every: _Positive = 16
    stop: StopSettings | None = None
    adapter: AdapterSettings | None = None
    techniques: list[str | dict[str, dict[str, Any] | None]] = []
    checkpoints: str | None = None

    @property
    def technique_list(self) -> list[str | dict[str, dict[str, Any]]]:
        """The techniques as a ``TechniqueSet`` takes them."""
        return [
            given if isinstance(given, str) else {name: settings or {} for name, settings in given.items()}
            for given in self.techniques
        ]

    @model_validator(mode="after")
    def _checked(self) -> Arm:
        try:
            TechniqueSet(self.technique_list)
        except OptionError as error:
            raise ValueError(str(error)) from error
        return self


class MergeChoice(_Settings):
    """One merge method of a study.

    Attributes:
        method: Its name.
        parameters: Its parameters.
        scales: First grid of the search for a scale.
        tune: Whether to search the scale at all; scale 1 otherwise.
    """

    method: str
    parameters: dict[str, Any] = {}
    scales: list[float] = list(FIRST_SCALES)
    tune: bool = True

    def make(self) -> MergeMethod:
        """The method itself."""
        return make_method(self.method, **self.parameters)

    @model_validator(mode="after")
    def _checked(self) -> MergeChoice:
        try:
            self.make()
            check_scales(self.scales)
        except OptionError as error:
            raise ValueError(str(error)) from error
        return self


class StudySettings(_Settings):
    """A study: every combination of arm, seed, checkpoint, merge method and number of experts is one cell.

    In the file, ``train`` holds what all arms share, ``arms`` says where each differs, and ``axes`` multiplies: with
    ``axes: {schedule: {cosine: {...}, constant: {...}}, stop: {...}}`` there is one arm for each combination, on top
    of every entry of ``arms``. ``methods`` is a list of names, or labels with parameters, ``scales`` and ``tune``.

    Attributes:
        name: The study's name.
        suite: Where model and tasks come from.
        tasks: Names of the tasks; None for all of the suite.
        seeds: One run of every arm and task each.
        steps: Checkpoints, rising; a geometric grid shows most.
        picks: Choices among each run's own checkpoints, merged as well: ``best_validation``.
        counts: Numbers of experts to merge; the first ones in the order of ``tasks``. None for all.
        arms: Ways to train.
        methods: Ways to merge.
        metric: Which metric of the evaluations; may be left out where there is only one.
        max_evaluations: Most scales to try in one search.
    """

    name: str
    suite: SuiteSettings
    tasks: list[str] | None = None
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    steps: Annotated[list[_Positive], Field(min_length=1)]
    picks: list[Literal["best_validation"]] = []
    counts: list[Annotated[int, Field(ge=2)]] | None = None
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    methods: Annotated[dict[str, MergeChoice], Field(min_length=1)]
    metric: str | None = None
    max_evaluations: _Positive = MAX_EVALUATIONS

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        plain = dict(content)
        shared, axes = plain.pop("train", None) or {}, plain.pop("axes", None) or {}
        arms = plain.get("arms", None if not axes else {"": {}}) or {"plain": {}}
        if all(isinstance(part, Mapping) for part in (shared, axes, arms)):
            plain["arms"] = dict(_product(shared, axes, arms))
        plain["methods"] = _methods(plain.get("methods"))
        return plain

    @model_validator(mode="after")
    def _consistent(self) -> StudySettings:
        problems = [
            f"`{key}` must be different values, not {values}"
            for key, values in (("steps", self.steps), ("seeds", self.seeds), ("tasks", self.tasks or []))
            if len(set(values)) != len(values)
        ]
        if self.steps != sorted(self.steps):
            problems.append(f"`steps` must rise, as in {sorted(self.steps)}")
        names = [*self.arms, *self.methods]
        problems += [
            f"{name!r} cannot name a file: use letters, digits and . _ + -"
            for name in names
            if not _NAME.fullmatch(name)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_study(path: str | Path) -> StudySettings:
    """Read a study file.

    Raises:
        FormatError: If it cannot be read, or is not YAML.
        OptionError: If it says something that a study does not have; every such key is named.
    """
    return parse_study(read_yaml(path), str(path))


def parse_study(content: Any, label: str = "the study") -> StudySettings:
    """Settings from what a study file holds.

    Raises:
        OptionError: As :func:`load_study`.

    Example:
        >>> parse_study({"name": "x", "suite": {"target": "m:f"}, "step": [1], "methods": ["ties"]})
        Traceback (most recent call last):
        mergeready.errors.OptionError: the study: `steps` is missing; `step` is unknown, did you mean `steps`?
    """
    try:
        return StudySettings.model_validate(content)
    except ValidationError as error:
        raise OptionError(f"{label}: {'; '.join(_sentence(item) for item in error.errors())}") from None


def _sentence(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"`{key}` is missing"
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f", did you mean `{near[0]}`?" if near else f"; known keys there are {', '.join(known)}"
        return f"`{key}` is unknown{hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"`{key}`: {message} (given: {item['input']!r})" if key else message


def _known_keys(place: Sequence[int | str]) -> list[str]:
    """Keys that may stand at a place, named by the keys that lead to it."""
    if not place:
        return sorted({"train", "axes", *StudySettings.model_fields})
    if place[0] == "methods":
        return sorted(_RESERVED)
    if len(place) == 2 and place[0] == "arms":  # whatever the arm is called
        return sorted(Arm.model_fields)
    parts: dict[int | str, type[BaseModel]] = {
        "suite": SuiteSettings,
        "schedule": RateSettings,
        "stop": StopSettings,
        "adapter": AdapterSettings,
    }
    return sorted(parts.get(place[-1], Arm).model_fields)


def _product(
    shared: Mapping[str, Any], axes: Mapping[str, Any], arms: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Every arm with what it shares, once for each combination of the axes' values."""
    choices = [list((values or {}).items()) for values in axes.values()]
    for (name, own), *combination in itertools.product(arms.items(), *choices):
        label = "+".join(part for part in (name, *(key for key, _ in combination)) if part)
        made = dict(shared)
        for difference in (own, *(value for _, value in combination)):
            if not isinstance(difference or {}, Mapping):
                made = difference  # the schema says what is wrong with it
                break
            made |= difference or {}
        yield label, made


def _methods(given: Any) -> Any:
    """Labels to merge choices; parameters of a method stand beside what is ours."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {name if isinstance(name, str) else str(name): {} for name in given}
    if not isinstance(given, Mapping) or not all(isinstance(v or {}, Mapping) for v in given.values()):
        return given
    made = {}
    for label, settings in given.items():
        own = {key: value for key, value in (settings or {}).items() if key in _RESERVED}
        parameters = {key: value for key, value in (settings or {}).items() if key not in _RESERVED}
        made[label] = {"method": label, **own, "parameters": parameters}
    return made
