"""Experts that are given twice, and bases that are given as experts: allowed, but seldom meant."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mergeready.experts.base import Base
from mergeready.experts.open import Expert
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.source import chunk_ranges

logger = logging.getLogger("mergeready")

_SAMPLE = 16  # elements of each parameter
_NOTHING = "nothing"


def warn_if_repeated(base: Base, experts: Sequence[Expert]) -> None:
    """Warn of experts that are the same, and of those that are the base.

    By their folders, else by their changes: of each parameter a few elements are looked at, and where those are equal
    all of them, until one differs.

    Args:
        base: The base.
        experts: The experts, in their order.
    """
    samples = [_sample(expert.vector) for expert in experts]
    for place, (expert, sample) in enumerate(zip(experts, samples, strict=True)):
        if (expert.format == "full" and _one_folder(base.folder, expert.folder)) or (
            sample == _NOTHING and _is_zero(expert.vector)
        ):
            logger.warning(
                "expert %d (%s) changes nothing: it is the base itself, and counts in means all the same",
                place + 1,
                expert.label,
            )
            continue
        for earlier, other in enumerate(experts[:place]):
            if _one_folder(other.folder, expert.folder) or (
                samples[earlier] == sample and _are_equal(other.vector, expert.vector)
            ):
                logger.warning(
                    "experts %d (%s) and %d (%s) are the same, which counts twice",
                    earlier + 1,
                    other.label,
                    place + 1,
                    expert.label,
                )
                break


def _one_folder(first: Path | None, second: Path | None) -> bool:
    return first is not None and second is not None and first.resolve() == second.resolve()


def _sample(vector: TaskVector) -> str:
    """What tells most changes apart: equal for equal ones."""
    digest, there = hashlib.sha256(), False
    for name, info in vector.infos.items():
        start = max(0, (info.numel - _SAMPLE) // 2)
        values = vector.flat(name, start, min(start + _SAMPLE, info.numel)).cpu()
        there = there or bool(values.any())
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest() if there else _NOTHING


def _is_zero(vector: TaskVector) -> bool:
    return not any(
        bool(vector.flat(name, start, stop).any())
        for name, info in vector.infos.items()
        for start, stop in chunk_ranges(info)
    )


def _are_equal(first: TaskVector, second: TaskVector) -> bool:
    return first.infos.keys() == second.infos.keys() and all(
        torch.equal(first.flat(name, start, stop).cpu(), second.flat(name, start, stop).cpu())
        for name, info in first.infos.items()
        for start, stop in chunk_ranges(info)
    )
