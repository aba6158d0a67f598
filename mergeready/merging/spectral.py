"""What methods on singular vectors share: deltas as matrices in a small common frame, and decompositions of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, Dense, LowRank, dense
from mergeready.merging.method import MatrixMethod, Place
from mergeready.merging.registry import require_elementwise

ZERO = 1e-6
"""Singular values below this share of the largest count as zero: what fp32 leaves of a matrix of lower rank.

Their singular vectors are arbitrary, so results must not depend on them.
"""

_CANCELLED = 1e-12  # of the norms of what was added: rounding in float64


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(MatrixMethod):
    """A matrix method that commutes with changes of basis: ``f(Q τ₁ Pᵀ, Q τ₂ Pᵀ, …) = Q f(τ₁, τ₂, …) Pᵀ``.

    So low-rank deltas are merged as small cores in a basis that holds them all, exactly, and no matrix of the
    parameter's size is decomposed. Arithmetic is float64. Experts that leave a parameter as it is (without a delta,
    with a delta of zeros or with weight 0) take no part in its merge.

    Attributes:
        rest: Name of the elementwise method, with its defaults, for parameters that are no matrices.
    """

    rest: str = "average"

    def __post_init__(self) -> None:
        require_elementwise("rest", self.rest)

    @abstractmethod
    def merge_changes(self, changes: Sequence[Tensor], side: int) -> Tensor:
        """Merge weighted deltas that are not zero.

        Args:
            changes: One float64 matrix an expert that takes part, all of one shape; computed at each access.
            side: The shorter side of the parameter itself, of which the matrices may be cores.
        """

    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        if not all_finite(deltas):
            return nothing(deltas, fill=float("nan"))
        return self.merge_exactly(deltas, weights).float()

    def merge_exactly(self, deltas: Sequence[Delta | None], weights: Sequence[float]) -> Tensor:
        """The merged matrix in float64, of deltas without NaN and infinite values."""
        frame = Frame.of(deltas, weights)
        if frame is None:
            return nothing(deltas)
        return frame.restore(self.merge_changes(frame.changes, min(frame.shape)))


@dataclass(frozen=True, eq=False)
class Changes(Sequence[Tensor]):
    """Weighted matrices ``wᵢ τᵢ`` in float64, made when they are asked for."""

    matrices: Sequence[Tensor]
    weights: Sequence[float]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.matrices[0].device

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are never taken
        # A new tensor in any case: results must not depend on how the given one lies in memory.
        return self.matrices[index].to(torch.float64, copy=True).contiguous().mul_(self.weights[index])


@dataclass(frozen=True, eq=False)
class Frame:
    """The deltas that take part in a merge, as matrices ``τᵢ = left · coreᵢ · rightᵀ``.

    Attributes:
        changes: The weighted cores; the weighted deltas themselves where there are no bases.
        shape: (rows, columns) of the parameter.
        left: Orthonormal basis of all columns, (rows, p), or None.
        right: Orthonormal basis of all rows, (columns, q), or None.
        slots: Which experts take part.
    """

    changes: Changes
    shape: tuple[int, int]
    left: Tensor | None
    right: Tensor | None
    slots: Sequence[int]

    @classmethod
    def of(cls, deltas: Sequence[Delta | None], weights: Sequence[float]) -> Frame | None:
        """The frame of one parameter; None where nothing changes it."""
        slots = [i for i, d in enumerate(deltas) if d is not None and weights[i] != 0 and changes_anything(d)]
        taking_part = [d for i, d in enumerate(deltas) if d is not None and i in slots]
        factors = [weights[i] for i in slots]
        if not slots:
            return None
        shape = _shape(taking_part[0])
        where = device_of(deltas)
        pairs = [_factors(d, where) for d in taking_part]
        small = [pair for pair in pairs if pair is not None]
        if len(small) < len(pairs) or sum(B.shape[1] for B, _ in small) >= min(shape):
            matrices = [as_matrix(d).to(where) for d in taking_part]
            return cls(Changes(matrices, factors), shape, None, None, slots)
        left, upper = torch.linalg.qr(torch.cat([B for B, _ in small], dim=1))
        right, lower = torch.linalg.qr(torch.cat([A for _, A in small], dim=0).T.contiguous())
        ranks = [B.shape[1] for B, _ in small]
        cores = [u @ v.T for u, v in zip(upper.split(ranks, 1), lower.split(ranks, 1), strict=True)]
        return cls(Changes(cores, factors), shape, left, right, slots)

    def whole(self, deltas: Sequence[Delta | None]) -> Frame:
        """The same without bases: changes are the deltas themselves."""
        chosen = [delta for slot in self.slots if (delta := deltas[slot]) is not None]
        matrices = [as_matrix(delta).to(self.changes.device) for delta in chosen]
        return Frame(Changes(matrices, self.changes.weights), self.shape, None, None, self.slots)

    def restore(self, core: Tensor) -> Tensor:
        """From a merged core to the parameter's matrix."""
        if self.left is None or self.right is None:
            return core
        return self.left @ (core @ self.right.T)


def all_finite(deltas: Sequence[Delta | None]) -> bool:
    """Whether no delta holds NaN or infinite values: decompositions would fail on them instead of naming them."""
    return all(bool(torch.isfinite(part).all()) for d in deltas if d is not None for part in _parts(d))


def nothing(deltas: Sequence[Delta | None], fill: float = 0.0) -> Tensor:
    """A merged delta that is the same everywhere."""
    shape = next(_shape(delta) for delta in deltas if delta is not None)
    return torch.full(shape, fill)


def as_matrix(delta: Delta) -> Tensor:
    """The whole change as (rows, columns)."""
    if isinstance(delta, LowRank):
        return delta.B.double() @ delta.A.double()
    return (delta.value if isinstance(delta, Dense) else dense(delta)).reshape(_shape(delta))


def thin_svd(
    matrix: Tensor, most: int | None = None, unit: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples that are not zero, largest first: U (rows, k), σ (k,), Vᵀ (k, columns).

    Long matrices are first reduced to a triangle: a QR decomposition costs a fraction of an SVD.

    Args:
        matrix: Any float64 matrix.
        most: How many triples at most.
        unit: What ``ZERO`` is a share of; the largest singular value by default.
    """
    rows, columns = matrix.shape
    if rows < columns:
        right, values, left = thin_svd(matrix.T.contiguous(), most, unit)
        return left.T, values, right.T
    triangle = torch.linalg.qr(matrix, mode="r").R if rows > columns else matrix
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    count = int((values > ZERO * (values[0] if unit is None else unit)).sum())
    count = count if most is None else min(count, most)
    if rows > columns:
        left = matrix @ (right[:count].T / values[:count])
    return left[:, :count], values[:count], right[:count]


def polar(matrix: Tensor) -> Tensor:
    """The nearest partial isometry U Vᵀ, from ``matrix = U Σ Vᵀ`` without its zero singular values.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)).abs()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    left, _, right = thin_svd(matrix)
    return left @ right


def total(changes: Iterable[Tensor]) -> Tensor:
    """Their sum; exactly zero where they cancel but for rounding, so that noise has no directions."""
    size, result = 0.0, None
    for change in changes:
        size += float(change.norm())
        result = change if result is None else result.add_(change)
    if result is None:
        raise ValueError("there is nothing to add")
    return result.zero_() if float(result.norm()) <= _CANCELLED * size else result


def _parts(delta: Delta) -> Sequence[Tensor]:
    return (delta.B, delta.A) if isinstance(delta, LowRank) else (delta.value,)


def changes_anything(delta: Delta) -> bool:
    """Whether a delta has entries that are not zero."""
    return all(bool(part.any()) for part in _parts(delta))


def _shape(delta: Delta) -> tuple[int, int]:
    rows = delta.shape[0]
    return rows, _numel(delta.shape[1:])


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def device_of(deltas: Sequence[Delta | None]) -> torch.device:
    """Where to compute: where the first delta is, if float64 exists there."""
    device = next(_parts(delta)[0].device for delta in deltas if delta is not None)
    return device if device.type != "mps" else torch.device("cpu")


def _factors(delta: Delta, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """B and A in float64, where the delta has a form of low rank."""
    if isinstance(delta, Dense):
        return None
    if isinstance(delta, LowRank):
        return delta.B.to(device, torch.float64), delta.A.to(device, torch.float64)
    if 4 * len(delta.index) >= min(_shape(delta)):  # selecting that many rows is no cheaper than all of them
        return None
    select = torch.zeros(delta.shape[0], len(delta.index), dtype=torch.float64, device=device)
    select[delta.index.to(device), torch.arange(len(delta.index), device=device)] = 1
    return select, delta.value.to(device, torch.float64).reshape(len(delta.index), -1)
