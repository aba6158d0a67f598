"""What a finished run hands on to whoever writes about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mergeready.experts.base import Base
from mergeready.training.history import History
from mergeready.training.peers import PeerLike


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run whose picks are final.

    Attributes:
        folder: The run's folder.
        picks: Folders of the picked checkpoints, by label; several labels may name one folder.
        base: The run's base, which can be read.
        peers: The peers as they were given.
        history: What was measured.
    """

    folder: Path
    picks: Mapping[str, Path]
    base: Base
    peers: Sequence[PeerLike]
    history: History


Share: TypeAlias = Callable[[FinishedRun], None]
"""Writes about the picks of a finished run, beside their weights. Called on the first rank."""
