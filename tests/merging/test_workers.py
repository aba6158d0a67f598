from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.merging.workers import check_threads, run_bounded


@given(
    needs=st.lists(st.integers(0, 9), max_size=12),
    threads=st.integers(1, 4),
    memory=st.integers(5, 20) | st.none(),
)
def test_all_jobs_run_once_within_the_bounds(needs: list[int], threads: int, memory: int | None) -> None:
    lock = threading.Lock()
    running: list[int] = []
    done: list[int] = []
    peaks = [0]
    crowds = [0]

    def job(index: int) -> None:
        with lock:
            running.append(needs[index])
            crowds.append(len(running))
            if len(running) > 1:
                peaks.append(sum(running))
        time.sleep(0.0002)
        with lock:
            running.remove(needs[index])
            done.append(index)

    jobs = [(need, lambda index=index: job(index)) for index, need in enumerate(needs)]
    run_bounded(jobs, threads=threads, memory=memory)
    assert sorted(done) == list(range(len(needs)))
    assert max(crowds) <= threads
    assert memory is None or max(peaks) <= memory


def test_two_run_at_a_time() -> None:
    both = threading.Barrier(2, timeout=60)
    run_bounded([(1, both.wait), (1, both.wait)], threads=2)


def test_the_first_failure_is_raised_and_ends_it() -> None:
    ran = []

    def fail() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        run_bounded([(0, fail), *((0, lambda: ran.append(1)) for _ in range(50))], threads=1)
    assert len(ran) <= 1


def test_torch_uses_one_thread_inside_and_as_many_as_before_outside() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen: list[int] = []
        run_bounded([(0, lambda: seen.append(torch.get_num_threads()))] * 4, threads=2)
        assert seen == [1] * 4
        assert torch.get_num_threads() == 3
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen[-1] == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads() -> None:
    assert check_threads(3) == 3
    assert check_threads(None) >= 1
    with pytest.raises(OptionError, match="`threads` must be at least 1, not 0"):
        check_threads(0)
