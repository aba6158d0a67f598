"""Several ranks on this machine, over gloo: what distributed tests run their functions in."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from mergeready.validation import share

# Children are forked from a server that has imported what takes long, every framework that some test trains with: ranks
# would each import them again. It has never computed a gradient, as a process that has cannot be forked. There is one
# server in a process, and what it imports can be said only once: all tests take their children from here.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "peft",
        "pytest",
        "datasets",
        "tests.loops",
        "tests.sharded",
        "mergeready.merging",
    ]
)


def run_ranks(function: Callable[..., Any], size: int, *args: Any, sharing: bool = False) -> list[Any]:
    """Call a function of a module on every rank; its results, in order. Whatever a rank raises fails the test.

    As in other tests, no reports on picks are written, unless `sharing`.
    """
    results: Any = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(
                target=_rank,
                args=(function, rank, size, f"{folder}/store", sharing, args, results),
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=120) for _ in processes)
        except Empty:
            raise AssertionError("a rank hangs") from None
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
    outcomes = [pickle.loads(found[rank]) for rank in range(size)]
    failures = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(outcomes) if not good]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def exit_code(function: Callable[..., Any], *args: Any) -> int | None:
    """Call a function of a module in a process of its own, which may be killed; minus the signal's number if it was."""
    process = CONTEXT.Process(target=_alone, args=(function, args))
    process.start()
    process.join(timeout=120)
    process.kill()
    return process.exitcode


def _alone(function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)  # as in the tests: other numbers of threads round differently
    share.share_run = None  # type: ignore[assignment]
    function(*args)


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    sharing: bool,
    args: Any,
    results: Any,
) -> None:
    torch.set_num_threads(1)
    if not sharing:
        share.share_run = None  # type: ignore[assignment]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        outcome = True, function(*args)
    except Exception:  # noqa: BLE001 - told to the test
        outcome = False, traceback.format_exc()
    # As bytes, since tensors would travel through shared memory, which ends with this process.
    results.put((rank, pickle.dumps(outcome)))
    results.close()
    results.join_thread()
    os._exit(0)  # other ranks may be gone already, and leaving a group in order would wait for them
