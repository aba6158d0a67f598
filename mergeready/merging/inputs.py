"""What tells one set of inputs from another, so that a merge is only continued with what it began with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from mergeready.merging.plan import MergeJob

_WHOLE, _BLOCK, _BLOCKS = 2**20, 2**12, 64


def job_key(job: MergeJob) -> str | None:
    """64 hex digits over everything a result depends on; None where an input lives in memory and is gone with it."""
    folders = [job.base.folder, *(expert.folder for expert in job.experts)]
    known = [folder for folder in folders if folder is not None]
    if len(known) < len(folders):
        return None
    facts = {
        "versions": [version("mergeready"), torch.__version__],
        "merge": job.settings.describe(),
        "options": [job.statistics, job.arithmetic, str(job.dtype)],
        "names": [sorted(expert.vector) for expert in job.experts],
        "inputs": [list(_file_facts(folder)) for folder in known],
        "output": [hashlib.sha256(file.head).hexdigest() for file in job.layout.files],
    }
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _file_facts(folder: Path) -> Iterator[tuple[str, int, str]]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            yield file.name, file.stat().st_mtime_ns, file_fingerprint(file)


def file_fingerprint(path: Path) -> str:
    """64 hex digits over a file's size, its first MiB and 64 blocks of 4 KiB spread evenly over the rest.

    Reads next to nothing of a large file, while other weights, another dtype or another header all differ.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = size - _BLOCK
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(_WHOLE))
        for index in range(_BLOCKS if size > _WHOLE else 0):
            digest.update(os.pread(file.fileno(), _BLOCK, last * index // (_BLOCKS - 1)))
    return digest.hexdigest()
