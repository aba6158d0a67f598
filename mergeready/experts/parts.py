"""What adapters store for one parameter, read lazily: each part gives a slice of that parameter's delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, Dense, LowRank, Rows
from mergeready.weights.source import TensorInfo, WeightSource, chunk_ranges


class Part(Protocol):
    """A contribution to one parameter's delta."""

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, fp32."""

    def delta(self) -> Delta:
        """The whole contribution in its most compact exact form."""


@dataclass(frozen=True, eq=False)
class LowRankPart:
    """LoRA's ``scaling · B A``, or its transpose where the parameter is stored (in, out).

    ``read_B`` and ``read_A`` give (out, r) and (r, in) matrices; they are called at every access, since a live
    adapter changes.
    """

    read_B: Callable[[], Tensor]
    read_A: Callable[[], Tensor]
    scaling: float
    shape: tuple[int, ...]
    transposed: bool = False

    def delta(self) -> LowRank:
        B, A = self.read_B().float() * self.scaling, self.read_A().float()
        return LowRank(A.T, B.T, self.shape) if self.transposed else LowRank(B, A, self.shape)

    def flat(self, start: int, stop: int) -> Tensor:
        return self.delta().flat(start, stop)


@dataclass(frozen=True, eq=False)
class ReplacePart:
    """A whole trained copy of a base parameter: ``copy − base``."""

    copy: Callable[[int, int], Tensor]
    base: Callable[[int, int], Tensor]
    info: TensorInfo

    def flat(self, start: int, stop: int) -> Tensor:
        trained = self.copy(start, stop).float()
        return trained - self.base(start, stop).to(device=trained.device, dtype=torch.float32)

    def delta(self) -> Dense:
        return Dense(self.flat(0, self.info.numel).reshape(self.info.shape))


@dataclass(frozen=True, eq=False)
class BiasPart:
    """The bias of LoRA's ``B`` layer (``lora_bias``), scaled like the matrix."""

    read: Callable[[], Tensor]
    scaling: float

    def flat(self, start: int, stop: int) -> Tensor:
        return self.read().reshape(-1)[start:stop].float() * self.scaling

    def delta(self) -> Dense:
        return Dense(self.read().float() * self.scaling)


@dataclass(frozen=True, eq=False)
class RowsPart:
    """Trained rows that take the place of base rows (``trainable_token_indices``)."""

    read: Callable[[], Tensor]
    index: Tensor
    base: WeightSource
    name: str

    def delta(self) -> Rows:
        old = torch.cat([self.base.read_rows(self.name, i, i + 1) for i in self.index.tolist()])
        new = self.read().float()
        return Rows(
            self.index, new - old.to(device=new.device, dtype=torch.float32), self.base.infos[self.name].shape
        )

    def flat(self, start: int, stop: int) -> Tensor:
        return self.delta().flat(start, stop)


@dataclass(frozen=True, eq=False)
class DoraPart:
    """DoRA: ``g ∘ (W + D) − W`` with ``g = magnitude / ‖W + D‖`` per output unit and ``D`` the LoRA delta.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), equation 5. Not low-rank.
    Output units are the parameter's rows, or its columns for embeddings and Conv1D (``by_column``), where
    each slice costs a pass over the whole parameter for the norms.
    """

    lora: LowRankPart
    magnitude: Callable[[], Tensor]
    base: Callable[[int, int], Tensor]
    info: TensorInfo
    by_column: bool = False
    normed: LowRankPart | None = None
    """The D inside the norm where a library leaves out its scaling there; ``lora`` by default."""

    def flat(self, start: int, stop: int) -> Tensor:
        columns = self.info.numel // max(self.info.rows, 1)
        lora = self.lora.delta()
        first, last = start // columns, math.ceil(stop / columns)
        weight = self._weight(lora, first * columns, last * columns).reshape(-1, columns)
        adapted = weight + lora.flat(first * columns, last * columns).reshape(-1, columns)
        gains = self.gains(first, last).float()
        change = ((gains if self.by_column else gains.unsqueeze(1)) * adapted - weight).reshape(-1)
        return change[start - first * columns : stop - first * columns]

    def gains(self, first: int, last: int) -> Tensor:
        """``g`` of rows ``first`` to ``last`` in float64, or of all columns with ``by_column``."""
        columns = self.info.numel // max(self.info.rows, 1)
        lora, magnitude = (self.normed or self.lora).delta(), self.magnitude().reshape(-1).double()
        if self.by_column:
            return magnitude / self._column_norms(lora, columns)
        adapted = self._weight(lora, first * columns, last * columns) + lora.flat(
            first * columns, last * columns
        )
        norms: Tensor = torch.linalg.vector_norm(adapted.reshape(-1, columns).double(), dim=1)
        return magnitude[first:last] / norms

    def _weight(self, lora: LowRank, start: int, stop: int) -> Tensor:
        return self.base(start, stop).to(device=lora.A.device, dtype=torch.float32)

    def _column_norms(self, lora: LowRank, columns: int) -> Tensor:
        squares = torch.zeros(columns, dtype=torch.float64, device=lora.A.device)
        for start, stop in chunk_ranges(self.info):
            adapted = self._weight(lora, start, stop) + lora.flat(start, stop)
            squares += adapted.double().square().reshape(-1, columns).sum(0)
        return squares.sqrt()

    def delta(self) -> Dense:
        return Dense(self.flat(0, self.info.numel).reshape(self.info.shape))


@dataclass(frozen=True, eq=False)
class GainBiasPart:
    """The bias of a layer whose whole output is multiplied by DoRA's gains: ``(g − 1) ∘ b``."""

    dora: DoraPart
    base: Callable[[int, int], Tensor]
    length: int

    def flat(self, start: int, stop: int) -> Tensor:
        bias, gains = self.base(start, stop), self.dora.gains(start, stop)
        return ((gains - 1) * bias.to(device=gains.device, dtype=torch.float64)).float()

    def delta(self) -> Dense:
        return Dense(self.flat(0, self.length))


@dataclass(frozen=True, eq=False)
class ExpertsPart:
    """LoRA of a stack of expert matrices (E, out, in): ``scaling · Bₑ Aₑ`` for each expert e.

    PEFT's ``target_parameters`` store A as (E·r, in), experts outermost, and B as (out, r·E), experts innermost. With
    ``transposed`` the stack is (E, in, out).
    """

    read_B: Callable[[], Tensor]
    read_A: Callable[[], Tensor]
    scaling: float
    info: TensorInfo
    transposed: bool = False

    def flat(self, start: int, stop: int) -> Tensor:
        count, width = self.info.shape[0], self.info.numel // self.info.shape[0]
        A = self.read_A().float()
        B = self.read_B().float() * self.scaling
        A, B = A.reshape(count, -1, A.shape[-1]), B.reshape(B.shape[0], -1, count).permute(2, 0, 1)
        first, last = start // width, math.ceil(stop / width)
        blocks = torch.bmm(B[first:last], A[first:last])
        flat = (blocks.transpose(1, 2) if self.transposed else blocks).reshape(-1)
        return flat[start - first * width : stop - first * width]

    def delta(self) -> Dense:
        return Dense(self.flat(0, self.info.numel).reshape(self.info.shape))


@dataclass(frozen=True, eq=False)
class SumPart:
    """Several contributions to one parameter, such as a trained base bias plus LoRA's own bias."""

    parts: Sequence[Part]
    shape: tuple[int, ...]

    def flat(self, start: int, stop: int) -> Tensor:
        total = self.parts[0].flat(start, stop)
        for part in self.parts[1:]:
            total = total + part.flat(start, stop)
        return total

    def delta(self) -> Dense:
        return Dense(self.flat(0, math.prod(self.shape)).reshape(self.shape))
