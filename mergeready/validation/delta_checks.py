"""What the change itself looks like: size, outliers, spread, and what rounding has left of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import torch

from mergeready.errors import NonFiniteError, NotTrainedError, listing
from mergeready.experts.sums import squared_norm
from mergeready.metrics.inspection import inspect_vector
from mergeready.validation.check import Limits, Result, check, compared, failed, passed
from mergeready.validation.subject import Subject
from mergeready.weights.source import chunk_ranges

_NARROWEST = 0.2
"""Spread of logarithms below which matrices count as equally far moved: layers differ by more in healthy experts."""

_FEWEST = 8
"""Matrices below which none is called an outlier."""


@check(
    "D200",
    "base",
    "error",
    "it differs from its base",
    fix="The expert is its base: check that the trained weights were saved.",
    cost="values",
)
def differs(subject: Subject, limits: Limits) -> Result:
    """‖τ‖ > 0, and finite."""
    try:
        squares = subject.squares
    except NotTrainedError as error:
        return failed(str(error))
    except NonFiniteError as error:
        return failed(
            str(error), fix="Share a checkpoint from before its training diverged, or save this one again."
        )
    changed = sum(value > 0 for value in squares.values())
    if not changed:
        return failed("every parameter equals the base's", value=0)
    return passed(f"{changed} of {len(squares)} parameters changed", value=math.sqrt(sum(squares.values())))


@check(
    "D201",
    "base",
    "warning",
    "no matrix moved far more than the others",
    fix="Look at the named matrices: a learning rate too high or a layer of its own; shorten or clip their training.",
    cost="values",
)
def drift(subject: Subject, limits: Limits) -> Result:
    """‖τ‖ / ‖θ₀‖ in all, and by matrix as robust z-scores (median and MAD) of its logarithm."""
    relative, total = _relative_norms(subject)
    if total > limits["relative_norm"]:
        return failed(
            f"‖τ‖ is {total:.2g} of the base's norm", value=total, threshold=limits["relative_norm"]
        )
    logs = {name: math.log(value) for name, value in relative.items()}
    if len(logs) < _FEWEST:
        return passed(
            f"‖τ‖ is {total:.2g} of the base's norm; too few matrices to call one an outlier", value=total
        )
    centre = median(logs.values())
    spread = max(1.4826 * median(abs(value - centre) for value in logs.values()), _NARROWEST)
    scores = {name: (value - centre) / spread for name, value in logs.items()}
    worst, limit = max(scores.values()), limits["outlier_z"]
    outliers = [name for name, score in scores.items() if score > limit]
    if outliers:
        message = f"{len(outliers)} matrices moved far more than the rest: {listing(outliers)}"
        return failed(message, where=tuple(outliers), value=worst, threshold=limit)
    return passed(f"‖τ‖ is {total:.2g} of the base's norm, without outliers", value=worst, threshold=limit)


@check(
    "D204",
    "base",
    "warning",
    "its stored dtype is fine enough for its change",
    fix="Save it in float32, or as an adapter: rounding to 16 bits has eaten part of what was learned.",
    cost="values",
)
def resolution(subject: Subject, limits: Limits) -> Result:
    """Share of ‖τ‖ that one rounding to the stored dtype loses, estimated as half a unit in the last place a value.

    Rounding errors of a value w are about uniform in ± ulp(w) / 2, so their mean square is ulp² / 12.
    """
    squares = subject.changed
    if subject.adapter_kind is not None:
        return passed("an adapter stores the change itself")
    narrow = {i.dtype for i in subject.source.infos.values() if i.dtype in (torch.bfloat16, torch.float16)}
    if not narrow:
        return passed("stored in 32 bits or more")
    base = subject.base.source
    noise = 0.0
    for name in squares:
        dtype = base.infos[name].dtype if base.infos[name].dtype in narrow else next(iter(narrow))
        for start, stop in chunk_ranges(base.infos[name]):
            weights = base.read_flat(name, start, stop).float().cpu()
            noise += squared_norm(torch.exp2(torch.floor(torch.log2(weights.abs().clamp(min=1e-30))))) * (
                torch.finfo(dtype).eps ** 2 / 12
            )
    lost = math.sqrt(noise / sum(squares.values()))
    stored = listing(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
    message = f"rounding to {stored} costs about {lost:.1%} of ‖τ‖"
    return compared(lost <= limits["relative_error"], message, value=lost, threshold=limits["relative_error"])


@check(
    "D203",
    "base",
    "info",
    "its change is spread over its parameters",
    fix="Nothing needs to be done; sharing an adapter or the changed tensors alone would be smaller.",
    cost="values",
)
def spread(subject: Subject, limits: Limits) -> Result:
    """Sparsity, mass of the largest entries and rank: what trimming and dropping methods will find."""
    _ = subject.changed
    found = inspect_vector(subject.expert.vector, subject.base.source)
    message = (
        f"{found.sparsity:.1%} of entries unchanged, {found.top_mass:.0%} of ‖τ‖² in the top 1 %, "
        f"rank at most {found.rank}, stable rank {found.stable_rank:.1f} on average"
    )
    return compared(
        found.sparsity <= limits["sparsity"], message, value=found.sparsity, threshold=limits["sparsity"]
    )


def _relative_norms(subject: Subject) -> tuple[Mapping[str, float], float]:
    """‖τ‖ / ‖θ₀‖ of each changed matrix, and of all parameters that it has together."""
    base, relative = subject.base.source, {}
    ours, theirs = sum(subject.changed.values()), 0.0
    for name, square in subject.squares.items():
        info = base.infos[name]
        own = sum(squared_norm(base.read_flat(name, a, b).float()) for a, b in chunk_ranges(info))
        theirs += own
        if len(info.shape) > 1 and own and square:
            relative[name] = math.sqrt(square / own)
    return relative, math.sqrt(ours / theirs) if theirs else math.inf
