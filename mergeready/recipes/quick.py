"""The quick version of a recipe: everything happens, nothing is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeready.recipes.override import overridden

_EXAMPLES = {"train": 32, "validation": 16, "test": 16}


def made_quick(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with few steps and examples, and with its own ``quick`` section on top.

    Example:
        >>> quick = made_quick({"output": "runs/a", "optimisation": {"epochs": 3}, "quick": {"model": "tiny"}})
        >>> quick["output"], quick["optimisation"]["steps"], quick["model"]
        ('runs/a-quick', 4, 'tiny')
    """
    optimisation = dict(_mapping(content.get("optimisation")))
    optimisation.pop("epochs", None)
    optimisation |= {"steps": 4, "save_every": 2, "log_every": 2, "device": "cpu", "precision": "float32"}
    optimisation |= {"batch_size": 4, "warmup": 0}
    run = _mapping(content.get("mergeready"))
    probing = run.get("probe", {}) is not False
    changes: dict[str, Any] = {
        "mergeready": {"measure": {"every": 2}},
        "output": f"{content.get('output')}-quick",
    }
    if probing:
        changes["mergeready"]["probe"] = {"max_evaluations": 3, "schedule": {"every": 2, "time_budget": None}}
    small = overridden(content, changes)
    small["optimisation"] = optimisation
    own = small.pop("quick", None) or {}
    if "members" in _mapping(own.get("team")):
        small["team"] = {**_mapping(small.get("team")), "members": {}}  # another team, not a larger one
    small = overridden(small, own)
    return overridden(small, {"data": _smaller(small.get("data"))})


def _smaller(data: Any) -> dict[str, Any]:
    if isinstance(data, Mapping) and isinstance(data.get("join"), Mapping):
        return {"join": {name: _smaller(part) for name, part in data["join"].items()}}
    return {"limit": _EXAMPLES}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
