from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.experts.svd import thin_svd

TOP = (1, 4, 16)
"""How many leading directions energies are stated for."""


@dataclass(frozen=True)
class Spectrum:
    """How a matrix spreads over its singular directions.

    Attributes:
        norm: ‖M‖_F.
        stable_rank: ‖M‖²_F / ‖M‖²₂: at least 1, at most the rank. NaN for a zero matrix.
        effective_rank: exp of the entropy of σ / Σσ (Roy and Vetterli, 2007). NaN for a zero matrix.
        top_energy: Number of leading directions to the share of ‖M‖²_F that they hold.
    """

    norm: float
    stable_rank: float
    effective_rank: float
    top_energy: dict[int, float]


def spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of one matrix, by a float64 SVD.

    *Evidence*: removing effective ranks from the linear model of 28 pairwise metrics made its predictions better
    (arXiv 2601.22285): no information about pairs of experts. What they say about late updates is open. *Cost*: one
    SVD.

    Example:
        >>> found = spectrum(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
        >>> round(found.stable_rank, 6), round(found.top_energy[1], 3)
        (2.25, 0.444)
    """
    return spectrum_of(thin_svd(matrix.double())[1])


def spectrum_of(values: Tensor, norm: float | None = None) -> Spectrum:
    """The same from singular values, largest first.

    Args:
        values: All that are not zero, or the leading ones.
        norm: ‖M‖_F where ``values`` are the leading ones only; the effective rank is then not known, NaN.
    """
    energy = values.double().square()
    total = float(energy.sum()) if norm is None else norm**2
    if not total:
        return Spectrum(0.0, math.nan, math.nan, dict.fromkeys(TOP, math.nan))
    shares = values.double() / values.double().sum()
    return Spectrum(
        norm=math.sqrt(total),
        stable_rank=total / float(energy[0]),
        effective_rank=float(torch.special.entr(shares).sum().exp()) if norm is None else math.nan,
        top_energy={count: float(energy[:count].sum()) / total for count in TOP},
    )
