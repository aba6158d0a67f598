from __future__ import annotations

import resource
import subprocess
import sys

import pytest

LOOP = """
import resource, torch
from mergeready.merging.allocation import keep_freed_memory
keep_freed_memory() if {kept} else None
def step():
    return [torch.zeros(2**19) for _ in range(8)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    script = LOOP.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that learns")
def test_freed_memory_is_used_again() -> None:
    # Without the call nearly every page of every step is a fault, unless what was imported freed a large block.
    pages = 50 * 8 * 2**21 // resource.getpagesize()
    assert faults(kept=True) < pages / 10
