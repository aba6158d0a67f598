"""Techniques in a study's training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn
from torch.optim import Optimizer

from mergeready.errors import UnsupportedError
from mergeready.merging.evaluation import Evaluate
from mergeready.study.settings import Arm


class Steering:
    """Drives an arm's techniques through a training loop; without any, it does nothing.

    Args:
        arm: The arm.
        model: The model that trains.
        base: The weights it started from.
        optimizer: Its optimizer.
        validation: The evaluation that techniques decide with.
        folder: For what the run writes; thrown away afterwards.
        total: Steps of the whole run.

    Attributes:
        reason: Why a technique wants to stop, if so.
    """

    def __init__(
        self,
        arm: Arm,
        model: nn.Module,
        base: Mapping[str, Tensor],
        optimizer: Optimizer,
        validation: Evaluate,
        folder: Path,
        total: int,
    ) -> None:
        if arm.techniques:
            raise UnsupportedError("this version of mergeready has no techniques; leave `techniques` out.")
        self.reason: str | None = None

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the optimizer."""

    def passes(self) -> Iterator[None]:
        """Around forward and backward of a step."""
        yield

    def stepped(self, step: int) -> None:
        """After an optimizer step."""

    def shown(self) -> AbstractContextManager[None]:
        """Around saving: the weights that the techniques want to be kept."""
        return nullcontext()
