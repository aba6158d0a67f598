from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError, OptionError, listing
from mergeready.weights.yaml_text import parse_yaml, read_yaml

Thresholds = Mapping[str, Mapping[str, float]]


@functools.cache
def default_thresholds() -> Thresholds:
    """What ships with the package."""
    text = (files("mergeready.validation") / "thresholds.yaml").read_text(encoding="utf-8")
    content: Thresholds = parse_yaml(text, "thresholds.yaml")
    return content


def read_thresholds(path: str | Path | None) -> Thresholds:
    """The package's thresholds, with those of a file in their place.

    Raises:
        FormatError: If the file is not YAML of the same form.
        OptionError: If it names a check or a threshold that does not exist; all are listed.
    """
    known = default_thresholds()
    if path is None:
        return known
    given: Any = read_yaml(path)
    if not isinstance(given, dict) or not all(isinstance(limits, dict) for limits in given.values()):
        raise FormatError(f"{path} must map check ids to thresholds by name, as in `D201: {{outlier_z: 6}}`.")
    unknown = [
        f"{check}.{name}"
        for check, limits in given.items()
        for name in limits
        if name not in known.get(check, {})
    ]
    if unknown:
        raise OptionError(f"{path} sets thresholds that do not exist: {listing(unknown)}.")
    wrong = [
        f"{check}.{name}={value!r}"
        for check, limits in given.items()
        for name, value in limits.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    if wrong:
        raise OptionError(f"{path} sets thresholds that are no numbers: {listing(wrong)}.")
    return {check: {**limits, **given.get(check, {})} for check, limits in known.items()}
