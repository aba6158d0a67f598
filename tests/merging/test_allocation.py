from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mergeready.merging import allocation

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that learns")

STEPS, BLOCKS, BLOCK_BYTES = 10, 8, 7 * 2**20
# All blocks of a step are less than what is kept after the call, 62 MiB, and more than glibc keeps by itself: twice the
# largest block that it saw freed, which is one of these.

# In a process that has imported nothing large: imports may free a large block, from which glibc learns the same, and
# what it has learned cannot be taken back. So the block that torch would allocate comes from malloc itself.
LOOP = f"""
import ctypes, importlib.util, resource, sys, types
libc = ctypes.CDLL(None)
assert libc.prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: where pages are huge, a block is met by few faults
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
freed = []
def empty(size, dtype):
    freed.append(size)
    libc.free(libc.malloc(size))
sys.modules["torch"] = types.SimpleNamespace(empty=empty, uint8=None)
spec = importlib.util.spec_from_file_location("allocation", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if sys.argv[2] == "kept":
    module.keep_freed_memory()
    assert len(freed) == 1
def step():
    blocks = [libc.malloc({BLOCK_BYTES}) for _ in range({BLOCKS})]
    for block in blocks: ctypes.memset(block, 1, {BLOCK_BYTES})
    for block in blocks: libc.free(ctypes.c_void_p(block))
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Whether a block of torch's lies in what the C library says it has handed out.
TORCH = """
import ctypes, torch
names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in names]
libc = ctypes.CDLL(None)
libc.mallinfo.restype = Info
def given():
    info = libc.mallinfo()
    return info.hblkhd + info.uordblks
before = given()
block = torch.empty(31 * 2**20, dtype=torch.uint8)
during = given()
del block
print(during - before, during - given())
"""


def output(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", *arguments], check=True, capture_output=True, text=True
    ).stdout


def faults(kind: str) -> int:
    return int(output(LOOP, str(Path(allocation.__file__)), kind))


def test_freed_memory_is_used_again() -> None:
    pages = STEPS * BLOCKS * BLOCK_BYTES // resource.getpagesize()
    assert faults("given back") > pages / 2
    assert faults("kept") < pages / 10


def test_torch_takes_blocks_from_the_c_library_and_gives_them_back() -> None:
    taken, freed = map(int, output(TORCH).split())
    assert 31 * 2**20 <= taken < 32 * 2**20
    assert 31 * 2**20 <= freed < 32 * 2**20
