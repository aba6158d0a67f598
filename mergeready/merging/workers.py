from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from mergeready.errors import OptionError


def check_threads(threads: int | None) -> int:
    """How many threads to use: as many as this process has cores by default.

    Raises:
        OptionError: If it is less than one.
    """
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise OptionError(f"`threads` must be at least 1, not {threads}.")
    return threads


def run_bounded(
    jobs: Iterable[tuple[int, Callable[[], None]]], *, threads: int, memory: int | None = None
) -> None:
    """Run jobs on several threads, starting no job before the memory it needs is free.

    Torch's own threads are off inside: jobs are the parallelism, and sums of a matrix product depend on how many
    threads share it, while results here must not.

    Args:
        jobs: Bytes needed and what to do, in the order of starting.
        threads: How many run at a time.
        memory: Bytes that all running jobs may need together. A single job that needs more runs alone.

    Raises:
        Exception: The first that a job raises; jobs that have not begun are dropped then.
    """
    budget = _Budget(threads, memory)
    before = torch.get_num_threads()
    failures: list[BaseException] = []

    def work(need: int, job: Callable[[], None]) -> None:
        try:
            if not failures:
                job()
        except BaseException as error:  # noqa: BLE001 - raised below, on the thread of the caller
            failures.append(error)
        finally:
            budget.give_back(need)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for need, job in jobs:
                budget.take(need)
                if failures:
                    break
                pool.submit(work, need, job)
    finally:
        torch.set_num_threads(before)  # what new threads shall have
    if failures:
        raise failures[0]


class _Budget:
    def __init__(self, slots: int, memory: int | None) -> None:
        self._slots, self._memory, self._running, self._used = slots, memory, 0, 0
        self._changed = threading.Condition()

    def take(self, need: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fits(need))
            self._running += 1
            self._used += need

    def give_back(self, need: int) -> None:
        with self._changed:
            self._running -= 1
            self._used -= need
            self._changed.notify()

    def _fits(self, need: int) -> bool:
        if not self._running:
            return True
        return self._running < self._slots and (self._memory is None or self._used + need <= self._memory)
