from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mergeready.errors import OptionError
from mergeready.weights.ranks import Ranks

_MEETING = timedelta(minutes=10)
_TIME_LIMIT = timedelta(days=7)  # the slowest rank sets the pace; a rank that died is noticed at once


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
        yield Ranks.alone()
        return
    if not started:
        dist.init_process_group("gloo", timeout=_MEETING)
    try:
        group = dist.new_group(backend="gloo", timeout=_TIME_LIMIT)
        yield Ranks(group)
    finally:
        if started:
            dist.destroy_process_group(group)
        else:
            dist.destroy_process_group()
