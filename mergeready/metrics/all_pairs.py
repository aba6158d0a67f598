"""All pairs of many fingerprints: blocks of experts against blocks of experts, as matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.compare import Pairs
from mergeready.metrics.sampled_block import Layout, Sampled, SampledBlock, open_sampled
from mergeready.weights.json_file import finite
from mergeready.weights.ranks import Ranks

ROWS = 256
"""Experts of one block; two blocks are in memory at a time, 2 bytes a coordinate."""
MOST_WITH_ERRORS = 200
"""Experts up to which standard errors are computed unless told otherwise: they double the work."""
_COLUMNS = 2**14

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class EstimatedComparison:
    """Pairwise estimates of many experts, in the order of ``labels``, as lists.

    Attributes:
        labels: The experts.
        norms: ‖τ‖ of each, exact.
        cosine: Cosine by pair, a list of rows.
        sign_conflict: Share of conflicting signs by pair, a list of rows; NaN where two share no sampled coordinate.
        cosine_error: Standard error of each cosine; None where it was not computed.
        sign_error: Standard error of each sign conflict; None where it was not computed.
    """

    labels: list[str]
    norms: list[float]
    cosine: list[list[float]]
    sign_conflict: list[list[float]]
    cosine_error: list[list[float]] | None = None
    sign_error: list[list[float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not known become null."""
        return {name: finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class AllPairs:
    """The same as arrays, which is what thousands of experts need: n × n numbers of 4 bytes each.

    Attributes:
        labels: The experts.
        norms: ‖τ‖ of each, exact; shape (n,).
        cosine: Cosine by pair; shape (n, n).
        sign_conflict: Share of conflicting signs by pair; NaN where two share no sampled coordinate.
        cosine_error: Standard error of each cosine; None where it was not computed.
        sign_error: Standard error of each sign conflict; None where it was not computed.
    """

    labels: list[str]
    norms: NDArray[np.float64]
    cosine: Floats
    sign_conflict: Floats
    cosine_error: Floats | None = None
    sign_error: Floats | None = None

    @classmethod
    def of(cls, pairs: Pairs) -> AllPairs:
        """The pairs of an exact comparison, which have no errors."""
        cosine, sign_conflict = (np.array(m, dtype=np.float32) for m in (pairs.cosine, pairs.sign_conflict))
        return cls(list(pairs.labels), np.array(pairs.norms), cosine, sign_conflict)

    def as_lists(self) -> EstimatedComparison:
        """As lists, for few experts."""
        errors = (self.cosine_error, self.sign_error)
        return EstimatedComparison(
            self.labels,
            self.norms.tolist(),
            self.cosine.tolist(),
            self.sign_conflict.tolist(),
            *(None if error is None else error.tolist() for error in errors),
        )


def compare_fingerprints(
    fingerprints: Sequence[str | Path | Fingerprint], *, rows: int = ROWS
) -> EstimatedComparison:
    """All pairs of some fingerprints with their standard errors, as lists; see :func:`compare_all`.

    Raises:
        OptionError: If there are fewer than two.
        BaseMismatchError: If their bases differ.
    """
    return compare_all(fingerprints, rows=rows, errors=True).as_lists()


@torch.no_grad()
def compare_all(
    fingerprints: Sequence[str | Path | Fingerprint],
    *,
    base: Base | None = None,
    rows: int = ROWS,
    errors: bool | None = None,
    ranks: Ranks | None = None,
) -> AllPairs:
    """All pairs of many fingerprints, streamed from their files.

    The same estimates and errors as :func:`~mergeready.metrics.estimates.estimate_cosine` and
    :func:`~mergeready.metrics.estimates.estimate_sign_conflict`. Fingerprints of different budgets are compared in the
    coordinates of the smallest. Memory is two blocks of ``rows`` experts and the n × n results (8 bytes a pair, 16 with
    errors): at default settings about 0.3 GB + 8 n² bytes. Work grows with n²: n² · budget · 3 multiplications and
    additions, half as many for large n since pairs are symmetric, twice as many with errors.

    Args:
        fingerprints: Fingerprints or their files.
        base: Their base, to check each against; by default they are checked against each other.
        rows: Experts of one block.
        errors: Whether to compute standard errors; by default up to 200 experts.
        ranks: Processes that share the work; each of them gets the whole result.

    Raises:
        FormatError: If a file is no fingerprint.
        OptionError: If there are fewer than two, or ``rows`` is not positive.
        BaseMismatchError: If their bases differ.
        MismatchError: If they disagree on a parameter's shape.
    """
    if len(fingerprints) < 2:
        raise OptionError(f"comparing needs at least two fingerprints, not {len(fingerprints)}.")
    if rows < 1:
        raise OptionError(f"`rows` must be at least 1, not {rows}.")
    ranks = ranks or Ranks.alone()
    with ranks.together():
        experts = open_sampled(fingerprints, base)
        layout = Layout.of(experts)
    count = len(experts)
    with_errors = count <= MOST_WITH_ERRORS if errors is None else errors
    kinds = ("cosine", "sign_conflict", "cosine_error", "sign_error")[: 4 if with_errors else 2]
    results = {kind: np.zeros((count, count), dtype=np.float32) for kind in kinds}
    starts = range(0, count, rows)
    blocks = _Blocks(experts, layout, rows)
    work = list(combinations_with_replacement(starts, 2))
    for first in range(0, len(work), ranks.size):
        mine = work[first + ranks.rank] if first + ranks.rank < len(work) else None
        with ranks.together():
            found = (
                None
                if mine is None
                else (mine, _compare_blocks(*blocks.pair(*mine), layout, with_errors=with_errors))
            )
        for part in ranks.each(found):
            if part is not None:
                _put(results, *part)
    np.fill_diagonal(results["cosine"], 1.0)
    np.fill_diagonal(results["sign_conflict"], 0.0)
    for kind in kinds[2:]:
        np.fill_diagonal(results[kind], 0.0)
    return AllPairs(
        labels=[expert.label for expert in experts],
        norms=np.array([expert.norm for expert in experts]),
        **results,
    )


class _Blocks:
    """Blocks of experts, the left one of the newest pair kept."""

    def __init__(self, experts: Sequence[Sampled], layout: Layout, rows: int) -> None:
        self._experts, self._layout, self._rows = experts, layout, rows
        self._left: tuple[int, SampledBlock] | None = None

    def pair(self, left: int, right: int) -> tuple[SampledBlock, SampledBlock]:
        if self._left is None or self._left[0] != left:
            self._left = None  # so that it is gone before the next one comes
            self._left = (left, self._load(left))
        return self._left[1], self._left[1] if left == right else self._load(right)

    def _load(self, start: int) -> SampledBlock:
        return SampledBlock(self._experts[start : start + self._rows], self._layout)


def _put(results: dict[str, Floats], place: tuple[int, int], found: dict[str, Floats]) -> None:
    row, column = place
    for kind, values in found.items():
        height, width = values.shape
        results[kind][row : row + height, column : column + width] = values
        results[kind][column : column + width, row : row + height] = values.T


def _compare_blocks(
    a: SampledBlock, b: SampledBlock, layout: Layout, *, with_errors: bool
) -> dict[str, Floats]:
    shape = len(a), len(b)
    cosine, variance = torch.zeros(shape), torch.zeros(shape)
    conflicts, shared = torch.zeros(shape), torch.zeros(shape)
    spread = torch.zeros(3, *shape)
    for index, place in enumerate(layout.places):
        sums = _sums(a, b, index, layout, with_errors=with_errors)
        weight = a.weights[:, index, None] * b.weights[None, :, index]
        cosine += weight * sums["cosine"]
        share, balance = sums["both"] / place.count, sums["balance"] / place.count
        conflict = (share - balance) / 2
        conflicts += place.share * conflict
        shared += place.share * share
        if with_errors and place.count < place.numel:
            variance += weight.square() * _square_error(sums, a.fourth[:, index], b.fourth[:, index])
            spread += (place.share**2 / place.count) * torch.stack(
                [conflict - conflict**2, conflict - conflict * share, share - share**2]
            )
    value = conflicts / shared  # 0 / 0 is NaN: nothing in common
    found = {"cosine": cosine, "sign_conflict": value}
    if with_errors:
        # Residuals of the ratio are conflict − value · both; their mean square is a polynomial in the value.
        residual = (spread[0] - 2 * value * spread[1] + value**2 * spread[2]).clamp(min=0)
        found |= {"cosine_error": variance.sqrt(), "sign_error": residual.sqrt() / shared}
    return {kind: values.numpy() for kind, values in found.items()}


def _square_error(sums: dict[str, Tensor], left: Tensor, right: Tensor) -> Tensor:
    """Σ (x y − c/2 (x² + y²))² of unit samples, multiplied out; 1 where a sample says nothing."""
    c, both = sums["cosine"], sums["x2y2"]
    found = both - c * (sums["x3y"] + sums["xy3"])
    found = (found + c.square() / 4 * (left[:, None] + 2 * both + right[None, :])).clamp(min=0)
    return torch.where((left[:, None] > 0) & (right[None, :] > 0), found, 1.0)


def _sums(
    a: SampledBlock, b: SampledBlock, index: int, layout: Layout, *, with_errors: bool
) -> dict[str, Tensor]:
    """Sums over one parameter's coordinates of products of two experts' samples, which are scaled to unit norm."""
    kinds = ["cosine", "balance", "both", *(["x2y2", "x3y", "xy3"] if with_errors else [])]
    sums = {kind: torch.zeros(len(a), len(b)) for kind in kinds}
    full = a.is_full(index) and b.is_full(index)
    for start, stop in _pieces(layout.places[index].start, layout.places[index].stop):
        x, signs_x = a.columns(index, start, stop)
        y, signs_y = (x, signs_x) if a is b else b.columns(index, start, stop)
        sums["cosine"].addmm_(x, y.T)
        sums["balance"].addmm_(signs_x, signs_y.T)
        if full:
            sums["both"] += stop - start
        else:
            sums["both"].addmm_(signs_x.abs(), signs_y.abs().T)
        if with_errors:
            sums["x2y2"].addmm_(x.square(), y.square().T)
            sums["x3y"].addmm_(x**3, y.T)
            sums["xy3"].addmm_(x, (y**3).T)
    return sums


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, _COLUMNS):
        yield begin, min(begin + _COLUMNS, stop)
