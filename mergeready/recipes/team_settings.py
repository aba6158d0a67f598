"""Several experts that are meant to be merged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from mergeready.recipes.sources import STRICT


class TeamSettings(BaseModel):
    """Several experts that are meant to be merged: one recipe, and what differs for each member.

    All members share base, seed and optimisation unless they say otherwise. Training goes in rounds: each member
    trains its share of the steps, then all exchange what the others may know of them, and the next round is measured
    against that. A member's rounds together are one run; only its peers change in between.
    """

    model_config = STRICT

    members: dict[str, dict[str, Any]] = Field(min_length=2)
    """By name: what differs from the recipe."""
    rounds: int = Field(default=2, ge=1)
    """How often members exchange."""
    exchange: Literal["fingerprints", "experts"] = "experts"
    """What members show each other: ``experts``, with which probes merge; or ``fingerprints``, which hold no weights,
    and against which interference is estimated."""
    merge: list[str | dict[str, dict[str, Any]]] = Field(default=["task_arithmetic"], min_length=1)
    """Methods to merge the team with at the end; scales are tuned on validation data."""
