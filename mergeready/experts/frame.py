"""The deltas of one parameter as float64 matrices in a small common frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, Dense, LowRank, dense
from mergeready.experts.svd import thin_svd
from mergeready.experts.task_vector import has_room

Memory: TypeAlias = dict[tuple[Any, ...], Any]

_TRIPLES = "singular triples"
_MOST_REMEMBERED = 2**24  # 128 MiB an expert


@dataclass(frozen=True, eq=False)
class Changes(Sequence[Tensor]):
    """Weighted matrices ``wᵢ τᵢ`` in float64, made when they are asked for.

    Attributes:
        matrices: The τᵢ.
        weights: The wᵢ.
        memories: For each where to keep what is found out about its τᵢ, see ``TaskVector.memory``; none by default.
        name: The parameter that they change; what is kept is kept under it.
    """

    matrices: Sequence[Tensor]
    weights: Sequence[float]
    memories: Sequence[Memory | None] = ()
    name: str = ""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.matrices[0].device

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are never taken
        # A new tensor in any case: results must not depend on how the given one lies in memory.
        return self.matrices[index].to(torch.float64, copy=True).contiguous().mul_(self.weights[index])

    def triples(self, index: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading singular triples of one of them, see ``thin_svd``; found once where it never changes."""
        memory = self.memories[index] if self.memories else None
        key = (_TRIPLES, self.name, most)
        if memory is not None and key in memory:
            left, values, right = memory[key]
        else:
            matrix = self.matrices[index].to(torch.float64).contiguous()
            left, values, right = thin_svd(matrix, most)
            elements = left.numel() + right.numel()
            if memory is not None and has_room(memory, _TRIPLES, elements, _MOST_REMEMBERED):
                memory[key] = left.clone(), values.clone(), right.clone()  # not the parts of larger ones
        factor = self.weights[index]
        return left * math.copysign(1.0, factor), values * abs(factor), right


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
    def of(
        cls,
        deltas: Sequence[Delta | None],
        weights: Sequence[float],
        memories: Sequence[Memory | None] = (),
        name: str = "",
    ) -> Frame | None:
        """The frame of one parameter; None where nothing changes it.

        ``memories`` and ``name`` are those of :class:`Changes`, one for each delta; bases of low-rank deltas are joint,
        so that nothing is kept about these.
        """
        slots = [i for i, d in enumerate(deltas) if d is not None and weights[i] != 0 and changes_anything(d)]
        taking_part = [d for i, d in enumerate(deltas) if d is not None and i in slots]
        factors = [weights[i] for i in slots]
        if not slots:
            return None
        shape = matrix_shape(taking_part[0])
        where = device_of(deltas)
        pairs = [_factors(d, where) for d in taking_part]
        small = [pair for pair in pairs if pair is not None]
        if len(small) < len(pairs) or sum(B.shape[1] for B, _ in small) >= min(shape):
            matrices = [as_matrix(d, where) for d in taking_part]
            kept = [memories[slot] for slot in slots] if memories else ()
            return cls(Changes(matrices, factors, kept, name), shape, None, None, slots)
        left, upper = torch.linalg.qr(torch.cat([B for B, _ in small], dim=1))
        right, lower = torch.linalg.qr(torch.cat([A for _, A in small], dim=0).T.contiguous())
        ranks = [B.shape[1] for B, _ in small]
        cores = [u @ v.T for u, v in zip(upper.split(ranks, 1), lower.split(ranks, 1), strict=True)]
        return cls(Changes(cores, factors), shape, left, right, slots)

    def whole(self, deltas: Sequence[Delta | None]) -> Frame:
        """The same without bases: changes are the deltas themselves."""
        chosen = [delta for slot in self.slots if (delta := deltas[slot]) is not None]
        matrices = [as_matrix(delta, self.changes.device) for delta in chosen]
        return Frame(Changes(matrices, self.changes.weights), self.shape, None, None, self.slots)

    def restore(self, core: Tensor) -> Tensor:
        """From a merged core to the parameter's matrix."""
        if self.left is None or self.right is None:
            return core
        return self.left @ (core @ self.right.T)


def all_finite(deltas: Sequence[Delta | None]) -> bool:
    """Whether no delta holds NaN or infinite values: decompositions would fail on them instead of naming them."""
    return all(bool(torch.isfinite(part).all()) for d in deltas if d is not None for part in _parts(d))


def as_matrix(delta: Delta, device: torch.device) -> Tensor:
    """The whole change as (rows, columns), on a device that has float64, which that of the delta may lack."""
    if isinstance(delta, LowRank):
        return delta.B.to(device, torch.float64) @ delta.A.to(device, torch.float64)
    return (delta.value if isinstance(delta, Dense) else dense(delta)).reshape(matrix_shape(delta)).to(device)


def _parts(delta: Delta) -> Sequence[Tensor]:
    return (delta.B, delta.A) if isinstance(delta, LowRank) else (delta.value,)


def changes_anything(delta: Delta) -> bool:
    """Whether a delta has entries that are not zero."""
    return all(bool(part.any()) for part in _parts(delta))


def matrix_shape(delta: Delta) -> tuple[int, int]:
    """(rows, columns) of a delta seen as a matrix."""
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
    if 4 * len(delta.index) >= min(
        matrix_shape(delta)
    ):  # selecting that many rows is no cheaper than all of them
        return None
    select = torch.zeros(delta.shape[0], len(delta.index), dtype=torch.float64, device=device)
    select[delta.index.to(device), torch.arange(len(delta.index), device=device)] = 1
    return select, delta.value.to(device, torch.float64).reshape(len(delta.index), -1)
