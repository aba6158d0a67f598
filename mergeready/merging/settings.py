"""What is done to which parameter: one method, scale and weights for all, and overrides for groups of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeready.errors import OptionError, listing
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.method import MergeMethod
from mergeready.merging.parameter import check_scale, check_weights
from mergeready.merging.registry import MethodLike, make_method
from mergeready.weights.source import WeightSource, is_mergeable


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
        optional: Those of the expressions that may match nothing.
    """

    default: Setting
    overrides: tuple[tuple[str, Setting], ...] = ()
    optional: frozenset[str] = frozenset()

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
                parameter of the method in force, or ``scale``, a factor on top of the merge's own scale. With
                ``required`` set to False it may match no parameter, which otherwise is taken for a mistake.
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
        made = [(key, *_override(key, given, default)) for key, given in (overrides or {}).items()]
        return cls(
            default,
            tuple((key, setting) for key, setting, _ in made),
            frozenset(key for key, _, required in made if not required),
        )

    @property
    def methods(self) -> list[MergeMethod]:
        """The methods of all settings."""
        return [self.default.method, *(made.method for _, made in self.overrides)]

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

    def check(self, base: WeightSource, vectors: Sequence[TaskVector]) -> None:
        """Look for overrides that match nothing, and let every method see whether it can merge these experts.

        Raises:
            OptionError: If an override matches no parameter of the base, and is not optional.
            MergeReadyError: If a method cannot merge them.
        """
        self._require_matches(base)
        used: dict[tuple[MergeMethod, tuple[float, ...]], list[str]] = {}
        for name in dict.fromkeys(name for vector in vectors for name in vector):
            setting = self.at(name)
            used.setdefault((setting.method, tuple(setting.weights)), []).append(name)
        for (method, weights), names in used.items():
            method.check(vectors, names, weights)

    def _require_matches(self, base: WeightSource) -> None:
        names = [name for name, info in base.infos.items() if is_mergeable(name, info)]
        wanted = [re.compile(key) for key, _ in self.overrides if key not in self.optional]
        lost = [pattern for pattern in wanted if not any(map(pattern.search, names))]
        if not lost:
            return
        tied = [
            f"{alias} goes by the name of {name}, to which it is tied"
            for alias, name in base.aliases.items()
            if any(pattern.search(alias) for pattern in lost)
        ]
        raise OptionError(
            f"overrides match no parameter of {base.label}: {listing(repr(p.pattern) for p in lost)}. They are regular "
            f"expressions on names such as {listing(names, 4)}{''.join(f'; {text}' for text in tied[:4])}. Mend them, "
            "or set `required` to False in those that may match nothing."
        )

    def describe(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        described = _described(self.default)
        if self.overrides:
            described["overrides"] = {
                key: _described(made) | ({"required": False} if key in self.optional else {})
                for key, made in self.overrides
            }
        return described


def _override(key: str, given: Mapping[str, Any], default: Setting) -> tuple[Setting, bool]:
    """What one override does, and whether it has to match something."""
    try:
        re.compile(key)
    except re.error as error:
        raise OptionError(f"the override {key!r} is not a regular expression ({error}).") from error
    if not isinstance(given, Mapping):
        raise OptionError(f"the override {key!r} must map settings to values, not be {given!r}.")
    parameters = dict(given)
    required = parameters.pop("required", True)
    if not isinstance(required, bool):
        raise OptionError(f"`required` of the override {key!r} must be true or false, not {required!r}.")
    scale = check_scale(parameters.pop("scale", 1.0))
    weights = check_weights(parameters.pop("weights", default.weights), len(default.weights))
    method: MethodLike = parameters.pop("method", default.method)
    if method is default.method and parameters:
        known = {field.name: getattr(method, field.name) for field in dataclasses.fields(default.method)}
        return Setting(make_method(default.method.name, **{**known, **parameters}), scale, weights), required
    return Setting(make_method(method, **parameters), scale, weights), required


def _described(setting: Setting) -> dict[str, Any]:
    return setting.method.describe() | {"scale": setting.scale, "weights": list(setting.weights)}
