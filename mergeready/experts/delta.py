"""One parameter's change, in fp32 with all scaling folded in: dense, low-rank or a few rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mergeready.errors import OptionError


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """A change stored element by element, in the shape of the parameter."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.value.shape)

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, fp32."""
        return self.value.reshape(-1)[start:stop].float()

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.value.double()))

    def rank(self) -> int:
        """Largest rank that the form allows."""
        return _full_rank(self.shape)


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """A change ``B @ A`` of a parameter seen as a matrix ``(rows, columns)``.

    ``B`` is (rows, r) and ``A`` is (r, columns); ``shape`` is the parameter's own shape, whose first
    dimension is ``rows`` and whose other dimensions multiply to ``columns``.
    """

    B: Tensor
    A: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, columns = _matrix_shape(self.shape)
        if self.B.shape != (rows, self.A.shape[0]) or self.A.shape[1] != columns:
            raise OptionError(
                f"factors {tuple(self.B.shape)} @ {tuple(self.A.shape)} do not make a change of shape {self.shape}."
            )

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, fp32."""
        columns = self.A.shape[1]
        first = start // columns
        last = math.ceil(stop / columns)
        rows = self.B[first:last].float() @ self.A.float()
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def pick(self, places: Tensor) -> Tensor:
        """Single elements by their numbers in row-major order, fp32: of each, r products."""
        columns = self.A.shape[1]
        rows, own = self.B.index_select(0, places // columns), self.A.T.index_select(0, places % columns)
        return (rows.float() * own.float()).sum(1)

    def norm(self) -> float:
        """Frobenius norm, from the r × r Gram matrices: ‖BA‖² = tr(BᵀB · AAᵀ)."""
        B, A = self.B.double(), self.A.double()
        return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))

    def rank(self) -> int:
        """Largest rank that the form allows."""
        return min(self.A.shape[0], _full_rank(self.shape))


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """A change of a few rows only: ``value[i]`` is added to row ``index[i]``; indices are unique."""

    index: Tensor
    value: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.value.shape != (len(self.index), *self.shape[1:]):
            raise OptionError(
                f"{tuple(self.value.shape)} are not {len(self.index)} rows of shape {self.shape}."
            )
        if len(torch.unique(self.index)) != len(self.index):
            raise OptionError("a row is changed twice.")
        if len(self.index) and not 0 <= int(self.index.min()) <= int(self.index.max()) < self.shape[0]:
            raise OptionError(f"row indices go beyond the {self.shape[0]} rows.")

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, fp32."""
        width = math.prod(self.shape[1:])
        first = start // width
        last = math.ceil(stop / width)
        block = torch.zeros(last - first, width, device=self.value.device)
        inside = (self.index >= first) & (self.index < last)
        block[self.index[inside] - first] = self.value[inside].reshape(-1, width).float()
        return block.reshape(-1)[start - first * width : stop - first * width]

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.value.double()))

    def rank(self) -> int:
        """Largest rank that the form allows."""
        return min(len(self.index), _full_rank(self.shape))


Delta: TypeAlias = Dense | LowRank | Rows


def dense(delta: Delta) -> Tensor:
    """The whole change in the parameter's shape, fp32.

    >>> dense(LowRank(B=torch.ones(2, 1), A=torch.tensor([[1.0, 2.0]]), shape=(2, 2)))
    tensor([[1., 2.],
            [1., 2.]])
    """
    return delta.flat(0, math.prod(delta.shape)).reshape(delta.shape)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _full_rank(shape: tuple[int, ...]) -> int:
    return min(_matrix_shape(shape)) if len(shape) > 1 else 1
