"""What is done to which parameter: one method, scale and weights for all, and overrides for groups of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeready.errors import OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import MergeMethod
from mergeready.merging.parameter import check_scale, check_weights
from mergeready.merging.registry import MethodLike, make_method


@dataclass(frozen=True)
class Setting:
    """What is done to one parameter: ``merged = base + scale · method(deltas, weights)``."""

    method: MergeMethod
    scale: float
    weights: Sequence[float]


@dataclass(frozen=True)
class MergeSettings:
    """A merge's method, scale and weights, with overrides for groups of parameters.

    Attributes:
        default: For every parameter that no override matches.
        overrides: Regular expressions with what is done to the parameters they match (``re.search`` on the base's
            parameter name); the first match counts. Their scales multiply the merge's own.
    """

    default: Setting
    overrides: tuple[tuple[str, Setting], ...] = ()

    @classmethod
    def make(
        cls,
        method: MethodLike,
        count: int,
        *,
        scale: float = 1.0,
        weights: Sequence[float] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        **parameters: Any,
    ) -> MergeSettings:
        """Check what a user asked for.

        Args:
            method: A method's name or a method with its parameters.
            count: Number of experts.
            scale: Factor on the merged delta.
            weights: One factor an expert; 1 each by default.
            overrides: Regular expression on parameter names to what differs there: ``method``, ``weights``, any
                parameter of the method in force, or ``scale``, a factor on top of the merge's own scale.
            **parameters: The method's parameters.

        Raises:
            OptionError: If anything is unknown, malformed or out of range.

        Example:
            >>> made = MergeSettings.make("ties", 2, scale=0.8, overrides={"embed": {"scale": 0.5}})
            >>> made.at("embed.weight").scale, made.at("layer.0.weight").scale
            (0.4, 0.8)
        """
        default = Setting(
            make_method(method, **parameters), check_scale(scale), check_weights(weights, count)
        )
        return cls(
            default, tuple((key, _override(key, given, default)) for key, given in (overrides or {}).items())
        )

    def at(self, name: str) -> Setting:
        """What is done to a parameter."""
        for key, made in self.overrides:
            if re.search(key, name):
                return replace(made, scale=self.default.scale * made.scale)
        return self.default

    def with_scale(self, scale: float) -> MergeSettings:
        """The same with another scale.

        Raises:
            OptionError: If it is not finite.
        """
        return replace(self, default=replace(self.default, scale=check_scale(scale)))

    def check(self, vectors: Sequence[TaskVector]) -> None:
        """Let every method see whether it can merge these experts.

        Raises:
            MergeReadyError: If one cannot.
        """
        used: dict[tuple[MergeMethod, tuple[float, ...]], list[str]] = {}
        for name in dict.fromkeys(name for vector in vectors for name in vector):
            setting = self.at(name)
            used.setdefault((setting.method, tuple(setting.weights)), []).append(name)
        for (method, weights), names in used.items():
            method.check(vectors, names, weights)

    def describe(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        described = _described(self.default)
        if self.overrides:
            described["overrides"] = {key: _described(made) for key, made in self.overrides}
        return described


def _override(key: str, given: Mapping[str, Any], default: Setting) -> Setting:
    try:
        re.compile(key)
    except re.error as error:
        raise OptionError(f"the override {key!r} is not a regular expression ({error}).") from error
    if not isinstance(given, Mapping):
        raise OptionError(f"the override {key!r} must map settings to values, not be {given!r}.")
    parameters = dict(given)
    scale = check_scale(parameters.pop("scale", 1.0))
    weights = check_weights(parameters.pop("weights", default.weights), len(default.weights))
    method: MethodLike = parameters.pop("method", default.method)
    if method is default.method and parameters:
        known = {field.name: getattr(method, field.name) for field in dataclasses.fields(default.method)}
        return Setting(make_method(default.method.name, **{**known, **parameters}), scale, weights)
    return Setting(make_method(method, **parameters), scale, weights)


def _described(setting: Setting) -> dict[str, Any]:
    return setting.method.describe() | {"scale": setting.scale, "weights": list(setting.weights)}
