from __future__ import annotations

from functools import cache

import torch

_BLOCK_BYTES = 31 * 2**20  # just below the largest block that the C library learns from


@cache
def keep_freed_memory() -> None:
    """Let the C library reuse freed memory where it would give it back to the system after each piece of a merge.

    Merging allocates and frees the same few megabytes for every piece, and a page that was given back costs a page
    fault to get again: half the time of a simple merge (measured). glibc raises its thresholds to the size of a
    large block that it sees freed ("dynamic mmap threshold", mallopt(3)), so one such block is made and freed.
    At most twice its size stays with the process; other C libraries are not affected.
    """
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
