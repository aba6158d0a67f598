from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from mergeready.errors import LostRankError, MergeReadyError, OptionError

_T = TypeVar("_T")
_MEETING = timedelta(minutes=10)
_TIME_LIMIT = timedelta(days=7)  # the slowest rank sets the pace; a rank that died is noticed at once


class Ranks:
    """The processes that share a merge: by itself one alone.

    Attributes:
        rank: Which one this is.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what exists once."""
        return self.rank == 0

    def gather(self, mine: _T) -> list[_T]:
        """Everyone's value, in order of ranks; waits for all."""
        return [mine]

    def together(self, action: Callable[[], _T]) -> _T:
        """Do something on every rank; if it fails on one, it fails on all.

        Raises:
            MergeReadyError: On ranks where it went well while it failed on another.
        """
        failure: Exception | None = None
        try:
            result = action()
        except LostRankError:
            raise
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message is not None:
                raise MergeReadyError(f"rank {rank} failed ({message}).")
        return result


class TorchRanks(Ranks):
    """The processes of a torch.distributed group, which exchanges small objects only."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, mine: _T) -> list[_T]:
        everyone: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(everyone, mine, group=self._group)
        except RuntimeError as error:
            raise LostRankError(
                f"another rank of this merge was lost ({error}). The same command continues where it stopped."
            ) from error
        return everyone


@contextmanager
def open_ranks(distributed: bool | None = None) -> Iterator[Ranks]:
    """The processes to share a merge with, by what started this one.

    Args:
        distributed: Whether to share. By default it is done where ``torchrun`` (or whoever sets ``RANK`` and
            ``WORLD_SIZE``) started several processes, or torch.distributed is initialised: then all ranks must call.

    Raises:
        OptionError: If ranks are asked for where there are none.
    """
    started = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    if distributed and not started and "RANK" not in os.environ:
        raise OptionError(
            "`distributed` needs ranks: start this with torchrun, or initialise torch.distributed."
        )
    if distributed is False or count == 1:
        yield Ranks()
        return
    if not started:
        dist.init_process_group("gloo", timeout=_MEETING)
    try:
        group = dist.new_group(backend="gloo", timeout=_TIME_LIMIT)
        yield TorchRanks(group)
    finally:
        if started:
            dist.destroy_process_group(group)
        else:
            dist.destroy_process_group()
