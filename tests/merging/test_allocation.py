from __future__ import annotations

import resource
import subprocess
import sys

import pytest

STEPS, BLOCKS, BLOCK_BYTES = 10, 8, 7 * 2**20
# All blocks of a step are less than what is kept after the call, 62 MiB, and more than glibc keeps by itself: twice the
# largest block that it saw freed. That is one of these, unless importing freed one of more than 28 MiB.

LOOP = f"""
import resource, torch
from mergeready.merging.allocation import keep_freed_memory
if {{kept}}:
    keep_freed_memory()
def step():
    return [torch.zeros({BLOCK_BYTES // 4}) for _ in range({BLOCKS})]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    script = LOOP.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that learns")
def test_freed_memory_is_used_again() -> None:
    pages = STEPS * BLOCKS * BLOCK_BYTES // resource.getpagesize()
    if faults(kept=False) < pages / 2:
        pytest.skip("what was imported has taught glibc already, so that the call changes nothing here")
    assert faults(kept=True) < pages / 10
