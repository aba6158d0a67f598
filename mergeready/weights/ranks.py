"""The processes of one run, and the little that they tell each other."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mergeready import errors
from mergeready.errors import LostRankError, MergeReadyError, UnsupportedError

logger = logging.getLogger("mergeready")

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this process is the one that writes files; true where there is only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others. Longer than the time-out of a training's own group: a rank that is stuck in a
collective of an evaluation is freed by that time-out, and reports here only then."""

_world: tuple[Any, Any] | None = None


class Ranks:
    """All processes of a ``torch.distributed`` run, or one process alone.

    They talk over a gloo group of their own: messages are small and on the CPU, accelerators need not wait for them,
    and they cannot be mistaken for collectives of the training. Everything but ``rank`` and ``size`` is a
    collective: every rank calls it, in the same order. Alone, all of it costs nothing. A collective raises
    ``LostRankError`` where another rank died.

    Attributes:
        rank: This process.
        size: Number of processes.

    Example:
        >>> ranks = Ranks.alone()
        >>> ranks.each("here"), ranks.on_first(lambda: 7)
        (['here'], 7)
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.size: int = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def alone(cls) -> Ranks:
        """One process, whatever else runs."""
        return cls()

    @classmethod
    def world(cls) -> Ranks:
        """All processes of the run. A collective the first time.

        Raises:
            UnsupportedError: In a run of several XLA processes that torch.distributed does not know of.
        """
        global _world
        _require_no_strangers()
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        if _world is None or _world[0] is not dist.group.WORLD:
            _world = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE))
        return cls(_world[1])

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace float64 CPU tensors by their sums over all ranks, in one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _noticing_losses():
            dist.all_reduce(flat, group=self._group)
        totals = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total.reshape(tensor.shape))

    def each(self, value: T) -> list[T]:
        """Every rank's value, in order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _noticing_losses():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def same(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _noticing_losses():
            dist.broadcast_object_list(values, src=0, group=self._group)
        result: T = values[0]
        return result

    def on_first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, on every rank.

        Raises:
            MergeReadyError: If it raised there; on the first rank the error itself.
        """
        value: Any = None
        with self.together():
            if self.is_first:
                value = action()
        return self.same(value)  # type: ignore[no-any-return]

    def _wait_until_read(self) -> None:
        """A process that ends at once takes with it what others have not received yet: why it failed."""
        try:
            dist.barrier(group=self._group)
        except RuntimeError as error:
            # Another has ended, so it has received all.
            logger.debug("a rank ended before all others knew of a failure (%s)", error)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A section that succeeds on every rank or raises on every rank.

        A rank whose section went well waits for the others. The section should hold no collectives, or a rank that
        fails before one leaves the others in it until their group's time-out.

        Raises:
            MergeReadyError: Of the same kind, where it was raised on another rank; the message names that rank.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self.each(_described(error))
            self._wait_until_read()
            raise
        failures = self.each(None)
        if any(failure is not None for failure in failures):
            self._wait_until_read()
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _rebuilt(rank, *failure)


def _require_no_strangers() -> None:
    """Raise where processes train together and would each take themselves for the only one."""
    xla = sys.modules.get("torch_xla.runtime")
    if xla is not None and xla.world_size() > 1 and not dist.is_initialized():
        raise UnsupportedError(
            f"this run has {xla.world_size()} XLA processes, which cannot be told from single ones here: each would "
            "measure and write as if it were alone. Use one process with SPMD, or initialise torch.distributed."
        )


@contextmanager
def _noticing_losses() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(f"another rank was lost, or is stuck ({error}).") from error


def _described(error: Exception) -> Any:
    return type(error).__name__, str(error)


def _rebuilt(rank: int, kind: str, message: str) -> MergeReadyError:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, MergeReadyError):
        return known(f"on rank {rank}: {message}")
    return MergeReadyError(f"rank {rank} raised {kind}: {message}")
