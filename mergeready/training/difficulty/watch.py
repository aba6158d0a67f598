from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mergeready.training.difficulty.observer import ForwardObserver
from mergeready.training.difficulty.tracker import Difficulty, DifficultyTracker
from mergeready.weights.ranks import Ranks

logger = logging.getLogger("mergeready")

_KEY = "difficulty"


class DifficultyWatch:
    """A run's tracking of difficulty, from its start to its files; does nothing where none was asked for.

    Args:
        settings: What to track; True for the defaults, None or False for nothing.
    """

    def __init__(self, settings: Difficulty | bool | None) -> None:
        self.settings = Difficulty() if settings is True else settings or None
        self.tracker = None if self.settings is None else DifficultyTracker(self.settings)
        self._observer: ForwardObserver | None = None
        self._restored: Mapping[str, Any] | None = None

    def start(self, model: nn.Module, ranks: Ranks, step: int) -> None:
        """Look at the model's forward passes from here on. A collective.

        Raises:
            UnsupportedError: If the model runs in several threads.
            HistoryError: If a saved state is damaged.
        """
        if self.settings is None:
            return
        self.tracker = DifficultyTracker(self.settings, ranks)
        restored = ranks.same(self._restored)
        if restored is not None:
            self.tracker.load_state_dict(restored)
        elif step:
            logger.warning(
                "the checkpoint of step %d holds no difficulties: those of this run begin after it.", step
            )
        self.tracker.step = step + 1
        self._observer = ForwardObserver(model, self.tracker)

    def took_step(self, step: int) -> None:
        """After an optimizer step. A collective at some steps, the same on every rank."""
        if self.tracker is None or self.settings is None:
            return
        before, every = self.tracker.step - 1, self.settings.settle_every
        self.tracker.step = step + 1
        if step // every > before // every:
            self.tracker.settle()

    def let_go(self) -> None:
        """Take the hooks off."""
        if self._observer is not None:
            self._observer.remove()

    def finish(self, folder: Path) -> None:
        """Take the hooks off and write what was found. A collective."""
        if self.tracker is None:
            return
        self.let_go()
        self.tracker.write(folder)
        if not len(self.tracker.table()) and self.tracker.ranks.is_first:
            logger.warning(
                "no example's difficulty was seen: give the training `with_example_ids(dataset)`, collated by "
                "`collate_with_ids`, or call `difficulty.observe` after each forward pass."
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, under a key of its own; empty where nothing is tracked. A collective otherwise."""
        return {} if self.tracker is None else {_KEY: self.tracker.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; before :meth:`start`."""
        self._restored = state.get(_KEY)
