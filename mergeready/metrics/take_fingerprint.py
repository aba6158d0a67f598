"""Taking a fingerprint: one pass over a task vector for norms and samples, two over its matrices for subspaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import NotTrainedError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.coordinates import coordinates, projection, sample_count
from mergeready.experts.fingerprint import BUDGET, Fingerprint
from mergeready.experts.sums import squared_norm
from mergeready.experts.task_vector import TaskVector, require_finite
from mergeready.metrics.labels import own_name
from mergeready.metrics.rounding import RoundingAccumulator
from mergeready.metrics.router import prototype, routed_layers
from mergeready.metrics.stream import Chunk
from mergeready.weights.source import TensorInfo, chunk_ranges, is_mergeable

RANK = 4
"""Right singular vectors kept of each matrix."""
WIDTH = 64
"""Numbers that each of them is projected to."""
_OVERSAMPLING = 8
_SMALLEST_SIDE = WIDTH


@torch.no_grad()
def take_fingerprint(
    vector: TaskVector,
    base: Base,
    *,
    label: str | None = None,
    budget: int = BUDGET,
    subspaces: bool = True,
    router: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Fingerprint:
    """Make an expert's fingerprint.

    Parameters that did not change are left out. Memory is bounded by a piece of a parameter, and for subspaces by a
    few vectors as long as a parameter has columns.

    Args:
        vector: The expert's task vector.
        base: Its base.
        label: How others shall call it; the last part of its path by default, so that no local path gets out.
        budget: Coordinates of the whole model, 2 bytes each; at least 1.
        subspaces: Whether to sketch the leading right singular vectors of matrices.
        router: Whether to add what routers choose experts by: the unit input that each linear layer's change answers
            most strongly (see :func:`~mergeready.metrics.router.prototype`), 2 bytes an input of the layer in files.
            Full experts then need one matrix at a time in float64.
        facts: Whatever else shall be in the file, JSON-ready. Of an expert that is stored in 16 bits, ``resolution``
            is added: what rounding left to be seen; see ``RoundingAccumulator``.

    Raises:
        NonFiniteError: If it holds NaN or infinite values.
        NotTrainedError: If it changes nothing.
        OptionError: If the budget is not positive.
    """
    if budget < 1:
        raise OptionError(f"`budget` must be at least 1 coordinate, not {budget}.")
    total = sum(info.numel for name, info in base.source.infos.items() if is_mergeable(name, info))
    squares: dict[str, float] = {}
    samples: dict[str, Tensor] = {}
    rounded = vector.rounded()
    rounding = RoundingAccumulator(rounded) if rounded else None
    for name in vector.infos:
        squares[name], samples[name] = _norm_and_samples(vector, base, rounding, name, total, budget)
    require_finite(vector.label, squares)
    changed = [name for name, value in squares.items() if value > 0]
    if not changed:
        raise NotTrainedError(f"{vector.label} equals its base: there is nothing to take a fingerprint of.")
    sketches = {
        name: _subspace(vector, name, vector.infos[name])
        for name in changed
        if subspaces and _is_large_matrix(vector.infos[name])
    }
    layers = routed_layers(base.source, changed) if router else {}
    return Fingerprint(
        label=label or own_name(vector.label),
        base=vector.base,
        shapes={name: vector.infos[name].shape for name in changed},
        norms={name: math.sqrt(squares[name]) for name in changed},
        samples={name: samples[name] for name in changed},
        subspaces=sketches,
        total=total,
        budget=budget,
        facts={**({} if rounding is None else {"resolution": rounding.resolution()}), **(facts or {})},
        router={
            name: prototype(vector[name], inputs_first=first).half().float() for name, first in layers.items()
        },
    )


def _norm_and_samples(
    vector: TaskVector, base: Base, rounding: RoundingAccumulator | None, name: str, total: int, budget: int
) -> tuple[float, Tensor]:
    info = vector.infos[name]
    wanted, order = torch.sort(coordinates(name, info.numel, sample_count(info.numel, total, budget)))
    values = torch.empty(len(wanted))
    square = 0.0
    for start, stop in chunk_ranges(info):
        original = None
        if rounding is not None and rounding.needs_base(name):
            original = base.source.read_flat(name, start, stop).float()
        chunk = vector.flat(name, start, stop, original)
        square += squared_norm(chunk)
        if rounding is not None:
            original = torch.zeros_like(chunk) if original is None else original.to(chunk.device)
            rounding.update(Chunk(name, original, [chunk], start))
        first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
        values[order[first:last]] = chunk[(wanted[first:last] - start).to(chunk.device)].cpu()
    # As files hold them: a fingerprint in memory and the same from a file then say the same.
    return square, values.to(torch.bfloat16).float()


def _is_large_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and min(info.shape) >= _SMALLEST_SIDE


def _subspace(vector: TaskVector, name: str, info: TensorInfo) -> Tensor:
    """The leading right singular vectors, projected to ``WIDTH`` numbers each: shape (RANK, WIDTH).

    A randomised range finder (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4 with one power step).
    """
    rows, columns = info.shape
    size = RANK + _OVERSAMPLING
    found = projection(f"range/{name}", rows, size).T.contiguous()  # (size, rows)
    basis = _orthonormal(_left_product(vector, name, info, found))
    images = _right_product(vector, name, info, basis)  # (rows, size)
    basis = _orthonormal(_left_product(vector, name, info, images.T.contiguous()))
    images = _right_product(vector, name, info, basis).double()
    _, directions = torch.linalg.eigh(images.T @ images)
    leading = directions.flip(1)[:, :RANK].to(basis.dtype)
    sketch: Tensor = (basis @ leading).T @ projection(name, columns, WIDTH)
    return sketch.half().float()  # as files hold it


def _orthonormal(sketch: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(sketch.T).Q  # (columns, size)
    return basis


def _left_product(vector: TaskVector, name: str, info: TensorInfo, left: Tensor) -> Tensor:
    """``left @ τ`` for ``left`` of shape (size, rows), read in row blocks."""
    columns = info.shape[1]
    product = torch.zeros(len(left), columns)
    for start, stop in _row_blocks(info):
        block = vector.flat(name, start * columns, stop * columns).cpu().reshape(-1, columns)
        product += left[:, start:stop] @ block
    return product


def _right_product(vector: TaskVector, name: str, info: TensorInfo, right: Tensor) -> Tensor:
    """``τ @ right`` for ``right`` of shape (columns, size)."""
    columns = info.shape[1]
    return torch.cat(
        [
            vector.flat(name, start * columns, stop * columns).cpu().reshape(-1, columns) @ right
            for start, stop in _row_blocks(info)
        ]
    )


def _row_blocks(info: TensorInfo) -> list[tuple[int, int]]:
    rows, columns = info.shape
    height = max(2**18 // columns, 1)
    return [(start, min(start + height, rows)) for start in range(0, rows, height)]
