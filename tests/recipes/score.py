"""An evaluation that recipes in tests name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def constant(data: Any, split: str, processor: Any, value: float) -> Callable[[Any], dict[str, float]]:
    return lambda model: {"score": value, "examples": float(len(data[split]))}
