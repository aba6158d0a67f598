"""A merge as a file: what to merge and how, for whoever wants to read, repeat or change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergeready.errors import FormatError, OptionError, listing
from mergeready.merging.registry import make_method
from mergeready.weights.yaml_text import read_yaml

RECIPE_NAME = "mergeready_merge.yaml"
_KEYS = ("mergeready", "torch", "base", "experts", "merge", "dtype", "arithmetic", "statistics")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class MergeRecipe:
    """What to merge and how.

    Attributes:
        base: Folder or hub id of the base.
        experts: Folders or hub ids of the experts.
        method: Name of the merge method.
        parameters: Its parameters.
        scale: Factor on the merged delta.
        weights: One factor an expert; None for 1 each.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        dtype: Name of the floating dtype of the result; None for the base's own.
        arithmetic: Dtype of sums.
        statistics: Where running statistics come from.
    """

    base: str
    experts: tuple[str, ...]
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    weights: Sequence[float] | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: str | None = None
    arithmetic: str = "float32"
    statistics: str = "base"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise OptionError(f"`dtype` must be one of {', '.join(_DTYPES)}, not {self.dtype!r}.")

    def options(self) -> dict[str, Any]:
        """Arguments for ``merge_folders`` and ``merge_plan``, beside base and experts.

        Raises:
            OptionError: If the method or a parameter of it is unknown, or a value is out of range.
        """
        return {
            "method": make_method(self.method, **self.parameters),
            "scale": self.scale,
            "weights": self.weights,
            "overrides": self.overrides,
            "dtype": None if self.dtype is None else _DTYPES[self.dtype],
            "arithmetic": self.arithmetic,
            "statistics": self.statistics,
        }


def read_recipe(path: str | Path) -> MergeRecipe:
    """Read the recipe that a merge wrote into its folder, or a mergekit configuration.

    Names in the file are looked up as hub ids or as paths from the working directory.

    Raises:
        FormatError: If it is neither, or holds what this version does not know.
        OptionError: If a mergekit configuration asks for what we do not have; all of it is listed.
    """
    path = Path(path)
    content = read_yaml(path)
    if isinstance(content, dict) and "merge_method" in content:
        from mergeready.merging.mergekit_yaml import from_mergekit

        return from_mergekit(content)
    if not isinstance(content, dict) or "mergeready" not in content:
        raise FormatError(f"{path} is neither a recipe of mergeready nor a configuration of mergekit.")
    return _from_own(content, path)


def _from_own(content: Mapping[str, Any], path: Path) -> MergeRecipe:
    unknown = [f"`{key}`" for key in content if key not in _KEYS]
    if unknown:
        raise FormatError(
            f"{path} has keys that this version does not know: {listing(unknown)}. Known are {', '.join(_KEYS)}; "
            "method, scale, weights and overrides stand below `merge`."
        )
    try:
        merge = dict(content["merge"])
        parts = {name: merge.pop(name) for name in ("method", "scale", "weights")}
        overrides = dict(merge.pop("overrides", {}))
        rest = {name: content[name] for name in ("dtype", "arithmetic", "statistics")}
        return MergeRecipe(
            base=content["base"]["label"],
            experts=tuple(expert["label"] for expert in content["experts"]),
            method=parts["method"],
            parameters=merge,
            scale=float(parts["scale"]),
            weights=tuple(map(float, parts["weights"])),
            overrides=overrides,
            **rest,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a recipe that this version understands ({error!r}).") from error
