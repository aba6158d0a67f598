"""Configurations of mergekit, for the methods that both have: read into our recipe, and written from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from mergeready.errors import OptionError, listing
from mergeready.merging.recipe import MergeRecipe

_TOP = {"models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}
_IGNORED = {"int8_mask"}  # how mergekit holds its masks: without a trace in the result
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_FILTERS = 6


@dataclass(frozen=True)
class _Known:
    """What a method of mergekit is called here, and what it may be told.

    ``own`` are parameters of the method and their defaults there; ``fixed`` are settings with their
    default there and the only value that means the same as our method.
    """

    ours: str
    own: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    weighted: bool = True


_DENSITY = {"density": 1.0}
_PLAIN, _RESCALED = {"rescale": (False, False)}, {"rescale": (True, True)}
_SUM, _MEAN = {"normalize": (False, False)}, {"normalize": (True, True)}
_METHODS = {
    "linear": _Known("average", fixed=_MEAN),
    "task_arithmetic": _Known("task_arithmetic", fixed=_PLAIN),
    "ties": _Known("ties", _DENSITY, _MEAN | _PLAIN),
    "dare_linear": _Known("dare_linear", _DENSITY, _SUM | _RESCALED),
    "dare_ties": _Known("dare_ties", _DENSITY, {"normalize": (False, True)} | _RESCALED),
    "breadcrumbs": _Known("breadcrumbs", _DENSITY | {"gamma": 0.01}, _SUM | _PLAIN),
    "della": _Known("della", _DENSITY | {"epsilon": 0.15}, _MEAN | _RESCALED),
    "della_linear": _Known("della_linear", _DENSITY | {"epsilon": 0.15}, _SUM | _RESCALED),
    "model_stock": _Known("model_stock", fixed={"filter_wise": (False, False)}, weighted=False),
    "nuslerp": _Known("slerp", fixed={"nuslerp_flatten": (True, True), "nuslerp_row_wise": (False, False)}),
}
_WITH_LAMBDA = _METHODS.keys() - {"linear", "model_stock", "nuslerp"}


def from_mergekit(content: Mapping[str, Any]) -> MergeRecipe:
    """The same merge in our terms, for configurations of mergekit 0.1.5 with ``models``.

    Results are equal up to rounding, since ours is done in fp32 whatever ``dtype`` is, but for random masks: mergekit
    rescales what DARE and DELLA keep to the old L1 norm, we divide by its probability as their papers do. Where
    signs cancel exactly, mergekit elects plus and we elect none.

    Args:
        content: The parsed YAML.

    Raises:
        OptionError: If it asks for what we do not have, naming each key.

    Example:
        >>> recipe = from_mergekit(yaml.safe_load('''
        ... merge_method: ties
        ... base_model: org/base
        ... models:
        ... - {model: org/law, parameters: {weight: 1.0, density: 0.5}}
        ... - {model: org/code, parameters: {weight: 0.5, density: 0.5}}
        ... parameters: {lambda: 0.8}
        ... '''))
        >>> recipe.method, recipe.experts, recipe.weights, recipe.scale, recipe.parameters
        ('ties', ('org/law', 'org/code'), (1.0, 0.5), 0.8, {'density': 0.5})
    """
    return _Reader(content).read()


class _Reader:
    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._problems: list[str] = [f"`{key}`" for key in content if key not in _TOP]
        self._shared = self._settings(content.get("parameters"), "parameters")

    def read(self) -> MergeRecipe:
        name = str(self._content["merge_method"])
        if name not in _METHODS:
            raise OptionError(
                f"`merge_method: {name}` is not among those that both have: {', '.join(_METHODS)}."
                + (
                    " Theirs turns weights, our slerp task vectors: nuslerp does that."
                    if name == "slerp"
                    else ""
                )
            )
        self._name, self._known = name, _METHODS[name]
        if self._content.get("tokenizer_source") not in (None, "base"):
            self._problems.append("`tokenizer_source` (the base's is kept)")
        base, experts, own = self._models()
        self._own = own
        self._check_names()
        default = self._resolve(frozenset())
        overrides = self._overrides(default)
        dtype, arithmetic = self._dtypes()
        if self._problems:
            raise OptionError(f"this configuration asks for what we do not have: {listing(self._problems)}.")
        return MergeRecipe(
            base=base,
            experts=tuple(experts),
            method=default["method"],
            parameters={key: default[key] for key in self._known.own},
            scale=default["scale"],
            weights=tuple(default["weights"]),
            overrides=overrides,
            dtype=dtype,
            arithmetic=arithmetic,
        )

    def _models(self) -> tuple[str, list[str], list[Mapping[str, Any]]]:
        models = self._content.get("models")
        if not isinstance(models, list) or not all(isinstance(m, Mapping) and "model" in m for m in models):
            raise OptionError("`models` must be a list of models; `slices` and `modules` are not read.")
        names = [self._reference(model["model"]) for model in models]
        given = self._content.get("base_model")
        if given is None and self._name != "linear":
            raise OptionError(f"`base_model` is needed: our {self._known.ours} merges changes of a base.")
        base = names[0] if given is None else self._reference(given)
        if self._name == "linear" and base not in names:  # there the base is a model like any other
            models, names = [*models, {"model": base}], [*names, base]
        kept = [i for i, name in enumerate(names) if name != base or self._name == "linear"]
        if not kept:
            raise OptionError("`models` holds nothing beside the base.")
        own = [self._settings(models[i].get("parameters"), f"parameters of {names[i]}") for i in kept]
        for i in kept:
            self._problems += [
                f"`{key}` of {names[i]}" for key in models[i] if key not in ("model", "parameters")
            ]
        return base, [self._adapter(names[i], base) for i in kept], own

    def _reference(self, text: Any) -> str:
        if not isinstance(text, str):
            self._problems.append(f"`model: {text}` (a path or hub id is needed)")
            return str(text)
        if "@" in text and not Path(text).exists():
            self._problems.append(f"the revision in `{text}` (download it and name the folder)")
        return text

    def _adapter(self, name: str, base: str) -> str:
        model, plus, adapter = name.partition("+")
        if not plus:
            return name
        if model != base:
            self._problems.append(f"`{name}` (its model is not the base)")
        return adapter

    def _settings(self, given: Any, where: str) -> Mapping[str, Any]:
        if given is not None and not isinstance(given, Mapping):
            self._problems.append(f"`{where}` (must map names to values)")
            return {}
        return given or {}

    def _check_names(self) -> None:
        known = {*self._known.own, *self._known.fixed, *_IGNORED, "weight", "density", "lambda", "normalize"}
        for settings in (self._shared, *self._own):
            self._problems += [f"`{key}`" for key in settings if key not in known]

    def _resolve(self, matched: frozenset[str]) -> dict[str, Any]:
        """Everything that holds for tensors in whose names exactly these filters occur."""
        known = self._known
        weights = [self._number("weight", matched, own) if known.weighted else 1.0 for own in self._own]
        result: dict[str, Any] = {"method": known.ours, "weights": weights, "scale": 1.0}
        if self._name in _WITH_LAMBDA:
            result["scale"] = self._number("lambda", matched, {}, 1.0)
        for key, default in known.own.items():
            values = {self._number(key, matched, own, default) for own in self._own}
            if len(values) > 1:
                self._problem(f"`{key}` that differs between models (ours has one for all)")
            result[key] = min(values)
        for key, (default, wanted) in known.fixed.items():
            self._check_fixed(key, self._find(key, matched, {}, default), wanted, weights)
        if self._name == "task_arithmetic" and self._find("normalize", matched, {}, False):
            result["method"] = "average"
        return result

    def _check_fixed(self, key: str, value: Any, wanted: Any, weights: Sequence[float]) -> None:
        if value == wanted or (self._name == "linear" and abs(sum(weights) - 1) < 1e-6):
            return
        self._problem(f"`{key}: {str(value).lower()}` (our {self._known.ours} has {str(wanted).lower()})")

    def _number(
        self, key: str, matched: frozenset[str], own: Mapping[str, Any], default: float | None = None
    ) -> float:
        value = self._find(key, matched, own, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            self._problem(f"`{key}: {value}`" if value is not None else f"no `{key}` (it is required)")
            return 1.0

    def _find(self, key: str, matched: frozenset[str], own: Mapping[str, Any], default: Any) -> Any:
        for settings in (own, self._shared):
            if key in settings:
                value = self._evaluate(key, settings[key], matched)
                if value is not None:
                    return value
        return default

    def _evaluate(self, key: str, setting: Any, matched: frozenset[str]) -> Any:
        for condition in _conditions(setting):
            if condition.get("filter") in (None, "*") or condition["filter"] in matched:
                value = condition.get("value")
                if isinstance(value, list):
                    self._problem(f"a list of values over layers for `{key}`")
                    return None
                return value
        return None

    def _problem(self, text: str) -> None:
        if text not in self._problems:
            self._problems.append(text)

    def _overrides(self, default: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        filters = _filters([self._shared, *self._own])
        if len(filters) > _MOST_FILTERS:
            self._problem(f"{len(filters)} different filters (at most {_MOST_FILTERS})")
            return {}
        kept: dict[frozenset[str], dict[str, Any]] = {frozenset(): dict(default)}
        for size in range(1, len(filters) + 1):
            for chosen in map(frozenset, combinations(filters, size)):
                made = self._resolve(chosen)
                if any(made != other for seen, other in kept.items() if seen < chosen):
                    kept[chosen] = made
        largest_first = sorted(kept, key=lambda chosen: -len(chosen))
        return {
            _pattern(sorted(chosen, key=filters.index)): {
                **self._difference(kept[chosen], default),
                "required": False,  # there, filters of tensors that are not there are no mistake
            }
            for chosen in largest_first
            if chosen
        }

    def _difference(self, made: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
        differs = {key: value for key, value in made.items() if value != default[key]}
        if "scale" in differs:
            if default["scale"] == 0:
                self._problem("a `lambda` of 0 with others for some tensors")
                return {}
            differs["scale"] = made["scale"] / default["scale"]
        return differs

    def _dtypes(self) -> tuple[str | None, str]:
        wanted = self._content.get("out_dtype") or self._content.get("dtype")
        if wanted is not None and wanted not in _DTYPES:
            self._problem(f"`dtype: {wanted}` (known are {', '.join(_DTYPES)})")
        return wanted, "float64" if self._content.get("dtype") == "float64" else "float32"


def _conditions(setting: Any) -> list[Mapping[str, Any]]:
    if isinstance(setting, Mapping):
        return [setting]
    if isinstance(setting, list) and all(isinstance(entry, Mapping) for entry in setting):
        return setting
    return [{"value": setting}]


def _filters(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    found = (
        condition.get("filter")
        for each in settings
        for value in each.values()
        for condition in _conditions(value)
    )
    return [name for name in dict.fromkeys(found) if isinstance(name, str) and name != "*"]


def _pattern(filters: Sequence[str]) -> str:
    """A regular expression for names in which all of these occur."""
    if len(filters) == 1:
        return re.escape(filters[0])
    return "^" + "".join(f"(?=.*{re.escape(name)})" for name in filters)


def to_mergekit(recipe: MergeRecipe) -> str:
    """The same merge as a configuration of mergekit; see :func:`from_mergekit` for what is equal.

    Raises:
        OptionError: If mergekit cannot do it, naming what it lacks.
    """
    names = {known.ours: name for name, known in _METHODS.items()}
    if recipe.method not in names:
        raise OptionError(f"mergekit has no method that is our {recipe.method}.")
    scaled = recipe.scale != 1 or _any(recipe.overrides, "scale")
    name = "task_arithmetic" if recipe.method == "average" and scaled else names[recipe.method]
    known = _METHODS[name]
    weights = recipe.weights or (1.0,) * len(recipe.experts)
    groups = {_literal(key): _plain_override(key, given, known) for key, given in recipe.overrides.items()}
    if scaled and name not in _WITH_LAMBDA:
        raise OptionError(f"mergekit's {name} has no scale; use scale 1.")
    if recipe.base in recipe.experts and name != "linear":
        raise OptionError(f"mergekit's {name} leaves the base out, which is one of the experts here.")
    shared: dict[str, Any] = {
        key: wanted for key, (default, wanted) in known.fixed.items() if default != wanted
    }
    if recipe.method == "average" and scaled:
        shared["normalize"] = True
    for key, default in known.own.items():
        shared[key] = _filtered(
            recipe.parameters.get(key, _our_default(recipe.method, key, default)), key, groups
        )
    if name in _WITH_LAMBDA:
        scales = {text: {"scale": given.get("scale", 1.0) * recipe.scale} for text, given in groups.items()}
        shared["lambda"] = _filtered(recipe.scale, "scale", scales if _any(groups, "scale") else {})
    models = []
    for i, expert in enumerate(recipe.experts):
        own = {text: {"weight": given["weights"][i]} for text, given in groups.items() if "weights" in given}
        weight = {"parameters": {"weight": _filtered(weights[i], "weight", own)}} if known.weighted else {}
        models.append({"model": expert, **weight})
    if name == "linear" and recipe.base not in recipe.experts:  # there the base is a model like any other
        models.append({"model": recipe.base, "parameters": {"weight": 0.0}})
    content: dict[str, Any] = {"merge_method": name, "base_model": recipe.base, "models": models}
    content |= {"parameters": shared} if shared else {}
    content["dtype"] = "float64" if recipe.arithmetic == "float64" else "float32"
    if recipe.dtype is not None:
        content["out_dtype"] = recipe.dtype
    return yaml.safe_dump(content, sort_keys=False)


def _our_default(method: str, key: str, default: float) -> float:
    from mergeready.merging.registry import method_class

    return float(getattr(method_class(method), key, default))


def _any(groups: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    return any(key in given for given in groups.values())


def _filtered(value: Any, key: str, groups: Mapping[str, Mapping[str, Any]]) -> Any:
    """A value, or a list of conditions where groups have another."""
    own = [{"filter": text, "value": given.get(key, value)} for text, given in groups.items()]
    return [*own, {"value": value}] if _any(groups, key) else value


def _literal(key: str) -> str:
    text = re.sub(r"\\(.)", r"\1", key)
    if re.escape(text) != key:
        raise OptionError(f"mergekit's filters are plain text, and the override {key!r} is a pattern.")
    return text


def _plain_override(key: str, given: Mapping[str, Any], known: _Known) -> Mapping[str, Any]:
    strange = [name for name in given if name not in ("weights", "scale", "required", *known.own)]
    if strange:
        raise OptionError(
            f"mergekit cannot change {listing(strange)} for a group, as the override {key!r} does."
        )
    return given
