"""In which directions the change goes: how many hold it, and whether they are the base's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, LowRank, Rows, dense
from mergeready.experts.svd import leading_svd, thin_svd
from mergeready.metrics.intruders import TOP, intruders
from mergeready.metrics.spectrum import Spectrum, spectrum_of
from mergeready.validation.check import Limits, NotCheckedError, Result, check, compared
from mergeready.validation.subject import Subject

SAMPLED = 8
"""Matrices that are looked at, evenly spread over the changed ones."""

_SMALLEST, _LARGEST = 16, 2**26
"""Fewest rows and columns, and most elements, of a matrix that is looked at: not heads, not large vocabularies."""

_VALUES = 64
"""Leading singular values of a dense change that are computed."""

_FREE = 4
"""Rank that a change must be allowed for a collapse to mean something."""


@check(
    "D202",
    "base",
    "info",
    "its change has more than one direction a matrix",
    fix="Nothing needs to be done if it does its task; a lower rank would do, or the learning rate was too high.",
    cost="values",
)
def directions(subject: Subject, limits: Limits) -> Result:
    """Median over up to eight matrices of stable rank, effective rank and energy; at LoRA's rank for adapters.

    *Cost*: a matrix ten products with 80 directions, or an SVD where it has 512 rows or columns at most.
    """
    deltas = [subject.expert.vector[name] for name in _sample(subject)]
    free = [delta for delta in deltas if delta.rank() >= _FREE]
    found = [spectrum_of_delta(delta) for delta in free or deltas]
    first = median(one.top_energy[1] for one in found)
    message = (
        f"stable rank {median(one.stable_rank for one in found):.1f}{_effective(found)}, "
        f"{first:.0%} of ‖τ‖² in the first direction, {median(one.top_energy[4] for one in found):.0%} in four "
        f"(median of {len(found)} matrices)"
    )
    kept = [half_energy(delta) for delta in free if isinstance(delta, LowRank)]
    if kept:
        message += f"; half the rank keeps {median(kept):.0%}"
    if not free:
        return compared(True, f"its form allows rank {max(delta.rank() for delta in deltas)} only; {message}")
    return compared(first <= limits["top_energy"], message, value=first, threshold=limits["top_energy"])


@check(
    "D205",
    "base",
    "info",
    "its leading directions are its base's",
    fix="Expect more forgetting; train at a lower rate or a higher rank, or scale the change down when merging.",
    cost="values",
)
def no_intruders(subject: Subject, limits: Limits) -> Result:
    """Share of intruder dimensions among the ten leading ones of up to eight matrices, and where they are.

    *Cost*: two SVDs a matrix, with more than 512 rows and columns by ten products with 80 and with 26 directions.
    """
    base, counts = subject.base.source, {}
    for name in _sample(subject):
        info = base.infos[name]
        before = base.read_flat(name, 0, info.numel).reshape(info.shape).double().cpu()
        counts[name] = intruders(before, before + dense(subject.expert.vector[name]).to(before))
    share = sum(counts.values()) / (TOP * len(counts))
    where = tuple(name for name, count in counts.items() if count)
    message = f"{share:.0%} of the {TOP} leading directions of {len(counts)} matrices are not the base's"
    return compared(
        share <= limits["intruders"], message, where=where, value=share, threshold=limits["intruders"]
    )


def spectrum_of_delta(delta: Delta) -> Spectrum:
    """The spectrum of a change: exact for low ranks and small matrices, else from its leading singular values."""
    values, norm = _values(delta), delta.norm()
    # What the leading values leave is more than rounding where there are others.
    left = norm**2 - float(values.square().sum())
    return spectrum_of(values, norm if left > 1e-6 * norm**2 else None)


def half_energy(delta: LowRank) -> float:
    """Share of ‖BA‖² that the best change of half its rank keeps."""
    energy = _values(delta).square()
    return float(energy[: math.ceil(delta.rank() / 2)].sum() / energy.sum())


def _values(delta: Delta) -> Tensor:
    if isinstance(delta, LowRank):
        left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (delta.B, delta.A.T))
        return thin_svd(left @ right.T)[1].cpu()
    matrix = delta.value if isinstance(delta, Rows) else dense(delta)
    return leading_svd(matrix.flatten(1).double().cpu(), _VALUES)[1]


def _effective(found: Iterable[Spectrum]) -> str:
    known = [one.effective_rank for one in found if not math.isnan(one.effective_rank)]
    return f", effective rank {median(known):.1f}" if known else ""


def _sample(subject: Subject) -> list[str]:
    """Changed matrices, from the first to the last."""
    infos = subject.base.source.infos
    names = [
        name
        for name in subject.changed
        if len(infos[name].shape) == 2
        and min(infos[name].shape) >= _SMALLEST
        and infos[name].numel <= _LARGEST
    ]
    if not names:
        raise NotCheckedError(
            f"no changed matrix has {_SMALLEST} rows and columns or more, and {_LARGEST:,} elements or fewer"
        )
    count = min(SAMPLED, len(names))
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
