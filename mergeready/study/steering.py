"""Techniques in a study's training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from torch import Tensor, nn
from torch.optim import Optimizer

from mergeready.experts.live import LiveExpert
from mergeready.training.history import History
from mergeready.training.techniques.registry import TechniqueLike
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique_set import TechniqueSet


class Steering:
    """Drives an arm's techniques through a training loop; without any, it does nothing.

    Studies do not probe while they train, so a technique that decides by probes has nothing to decide by.

    Args:
        techniques: The arm's techniques, with what the suite gives them.
        model: The model that trains.
        base: The weights it started from.
        optimizer: Its optimizer.
        total: Steps of the whole run.

    Raises:
        MergeReadyError: If techniques cannot be used together, or not in such a run.

    Attributes:
        reason: Why a technique wants to stop, if so.
    """

    def __init__(
        self,
        techniques: Sequence[TechniqueLike],
        model: nn.Module,
        base: Mapping[str, Tensor],
        optimizer: Optimizer,
        total: int,
    ) -> None:
        self.reason: str | None = None
        self._techniques = TechniqueSet(techniques)
        self._techniques.prepare(model, step=0)
        self._techniques.start(
            lambda: TechniqueRun(LiveExpert(model, base), optimizer=optimizer, total_steps=total)
        )

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the optimizer."""
        self._techniques.finish_hooks()

    def passes(self) -> Iterator[None]:
        """Around forward and backward of a step."""
        yield from self._techniques.passes()

    def stepped(self, step: int) -> None:
        """After an optimizer step."""
        self._techniques.took_step(step)
        decision = self._techniques.decide(History())
        self.reason = decision.reason if decision.stop else None

    def finish(self) -> None:
        """After the last step, for techniques that act on the weights then."""
        self._techniques.finish()

    def shown(self) -> AbstractContextManager[None]:
        """Around saving: the weights that the techniques want to be kept."""
        return self._techniques.shown()
