"""Low-rank changes as low-rank results: exact concatenation, and the best smaller rank without the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import LowRank

Rank: TypeAlias = int | float | str
"""``"exact"``; a whole number: the rank kept; a fraction: the smallest rank that keeps this share of ‖D‖²."""

_EXACT_SIDE = 1024
"""Up to this length of the shorter side, directions come from an eigenvalue problem; beyond, from a random sketch."""
_OVERSAMPLE, _PASSES = 16, 8


@dataclass(frozen=True, eq=False)
class Compressed:
    """A change of smaller rank, and what is left of the whole one.

    Attributes:
        delta: Its factors, both carrying √σ, so that they can be trained further.
        energy: ‖D‖² of the whole change.
        kept: ‖D_k‖² of what the factors hold.
    """

    delta: LowRank
    energy: float
    kept: float

    @property
    def share(self) -> float:
        """Share of the energy that was kept; 1 where there was none."""
        return min(self.kept / self.energy, 1.0) if self.energy > 0 else 1.0


def check_rank(rank: Rank) -> Rank:
    """``"exact"``, a positive whole number, or a share between 0 and 1.

    Raises:
        OptionError: If it is something else.
    """
    if rank == "exact":
        return rank
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return rank
    if isinstance(rank, float) and 0 < rank < 1:
        return rank
    raise OptionError(
        f"`rank` must be 'exact', a whole number of at least 1, or the share of energy to keep, such as 0.9; "
        f"not {rank!r}."
    )


def concatenated(deltas: Sequence[LowRank], factors: Sequence[float]) -> LowRank:
    """``Σ cᵢ Bᵢ Aᵢ`` exactly, as ``[c₁B₁, c₂B₂, …] [A₁; A₂; …]``; its rank is the sum of ranks.

    >>> one = LowRank(torch.ones(2, 1), torch.ones(1, 3), (2, 3))
    >>> both = concatenated([one, one], [0.5, 2.0])
    >>> both.rank(), (both.B @ both.A)[0].tolist()
    (2, [2.5, 2.5, 2.5])
    """
    B = torch.cat([c * delta.B.float() for c, delta in zip(factors, deltas, strict=True)], dim=1)
    return LowRank(B, torch.cat([delta.A.float() for delta in deltas]), deltas[0].shape)


def truncated(delta: LowRank, rank: int | float) -> Compressed:
    """The best approximation of smaller rank in the Frobenius norm, without the dense matrix where that is larger.

    With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A``, the singular values of ``B A`` are those of the small ``R_B R_Aᵀ``.

    Args:
        delta: The change, of rank at most R.
        rank: See ``Rank``.

    >>> torch.manual_seed(0) and None
    >>> whole = LowRank(torch.randn(30, 8), torch.randn(8, 20), (30, 20))
    >>> truncated(whole, 8).share > 0.999999, truncated(whole, 1).delta.rank()
    (True, 1)
    """
    if delta.A.shape[0] >= min(delta.B.shape[0], delta.A.shape[1]):
        return factorized(delta.B.float() @ delta.A.float(), rank, delta.shape)
    Q_B, R_B = torch.linalg.qr(delta.B.float())
    Q_A, R_A = torch.linalg.qr(delta.A.float().T)
    core = R_B.double() @ R_A.double().T
    basis, energies, total = _leading(core, rank)
    B, A = _balanced(Q_B @ basis.float(), (basis.T @ core).float() @ Q_A.T, energies)
    return Compressed(LowRank(B, A, delta.shape), total, float(energies.sum()))


def factorized(matrix: Tensor, rank: int | float, shape: tuple[int, ...]) -> Compressed:
    """Factors of a dense matrix, best in the Frobenius norm up to 1024 rows or columns.

    Beyond, the leading directions come from a random sketch (Halko et al., arXiv 0909.4061, algorithm 4.4, with eight
    passes), unless a share of energy is asked for; the energy kept is that of the factors, exactly, either way.

    Args:
        matrix: (rows, columns), fp32.
        rank: See ``Rank``.
        shape: The parameter's own shape.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    short = wide.shape[0]
    if isinstance(rank, int) and short > _EXACT_SIDE and rank + _OVERSAMPLE < short // 4:
        basis, energies = _sketched(wide, rank)
        total = float(torch.linalg.vector_norm(matrix.double())) ** 2
    else:
        basis, energies, total = _leading(wide.double(), rank)
    other = basis.float().T @ wide
    left, right = _balanced(basis.float(), other, energies)
    return Compressed(
        LowRank(right.T, left.T, shape) if tall else LowRank(left, right, shape), total, float(energies.sum())
    )


def _leading(matrix: Tensor, rank: int | float) -> tuple[Tensor, Tensor, float]:
    """Leading left singular vectors of a float64 matrix, their energies σ², and the energy of all."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    total = float(squares.sum())
    count = _count(squares, rank)
    return vectors[:, :count], squares[:count], total


def _count(energies: Tensor, rank: int | float) -> int:
    if isinstance(rank, int):
        wanted = rank
    else:
        reached = torch.cumsum(energies, 0) >= rank * energies.sum()
        wanted = int(reached.int().argmax()) + 1
    floor = float(energies[0]) * 1e-14 if len(energies) else 0.0  # beyond, directions are rounding
    return max(min(wanted, int((energies > floor).sum())), 1)


def _sketched(wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], rank + _OVERSAMPLE, generator=generator).to(wide)
    Q, _ = torch.linalg.qr(wide @ start)
    for _ in range(_PASSES):
        Q, _ = torch.linalg.qr(wide.T @ Q)
        Q, _ = torch.linalg.qr(wide @ Q)
    basis, energies, _ = _leading((Q.T @ wide).double(), rank)
    return Q.double() @ basis, energies


def _balanced(left: Tensor, right: Tensor, energies: Tensor) -> tuple[Tensor, Tensor]:
    """``left · right`` with √σ on each side; ``right`` carries σ before."""
    roots = energies.to(left).sqrt().sqrt()
    inverse = torch.where(roots > 0, 1 / roots, torch.zeros_like(roots))
    return left * roots, right * inverse[:, None]


def rounding_error(exact: LowRank, rounded: LowRank) -> float:
    """‖D − D̃‖ / ‖D‖ of factors that were rounded to a narrower dtype, estimated from 64 random directions.

    For Gaussian ω, ‖M ω‖² has the mean ‖M‖²; the products never leave factor form. Good to some 10 %.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(exact.A.shape[1], 64, generator=generator).to(exact.A.device)
    whole = exact.B.float() @ (exact.A.float() @ probes)
    narrow = rounded.B.float() @ (rounded.A.float() @ probes)
    norm = float(torch.linalg.vector_norm(whole))
    return float(torch.linalg.vector_norm(whole - narrow)) / norm if norm > 0 else 0.0
