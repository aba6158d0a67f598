"""The subspaces that peers write to and read from, and changes without what lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.coordinates import projection
from mergeready.experts.delta import Delta
from mergeready.experts.frame import Frame
from mergeready.experts.svd import thin_svd

Sides: TypeAlias = Literal["left", "right", "either"]
"""``left``: what the layer writes to, its outputs; ``right``: what it reads from, its inputs; ``either``: both."""


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Orthonormal bases of what shall be left to peers, of one matrix.

    Attributes:
        left: Of outputs, (rows, k); None for nothing.
        right: Of inputs, (columns, k); None for nothing.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def remove(self, change: Tensor) -> Tensor:
        """``(I − U Uᵀ) D (I − V Vᵀ)``: the nearest change that peers' subspaces see nothing of; a new tensor.

        >>> Subspaces(right=torch.tensor([[1.0], [0.0]])).remove(torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])
        """
        kept = change.clone()
        if self.left is not None:
            kept = kept - self.left @ (self.left.T @ kept)
        if self.right is not None:
            kept = kept - (kept @ self.right) @ self.right.T
        return kept


def peer_subspaces(deltas: Sequence[Delta | None], rank: int, sides: Sides = "right") -> Subspaces:
    """Bases of the leading singular vectors of peers' changes of one matrix, computed in float64, fp32.

    Args:
        deltas: One a peer; None where it changes nothing.
        rank: How many singular vectors of each peer.
        sides: Which.

    Raises:
        OptionError: If the rank is not positive.

    Example:
        >>> from mergeready.experts.delta import Dense
        >>> peer_subspaces([Dense(torch.tensor([[0.0, 2.0]]))], rank=1).right.abs()
        tensor([[0.],
                [1.]])
    """
    if rank < 1:
        raise OptionError(f"`rank` must be at least 1, not {rank}.")
    frame = Frame.of(deltas, [1.0] * len(deltas))
    if frame is None:
        return Subspaces()
    found = [thin_svd(change, rank) for change in frame.changes]
    left = torch.cat([U for U, _, _ in found], dim=1)
    right = torch.cat([V.T for _, _, V in found], dim=1)
    left = left if frame.left is None else frame.left @ left
    right = right if frame.right is None else frame.right @ right
    return Subspaces(
        _orthonormal(left) if sides != "right" else None, _orthonormal(right) if sides != "left" else None
    )


def sketched_right(name: str, columns: int, sketch: Tensor) -> Tensor:
    """An orthonormal basis, (columns, k), of the best guess at right singular vectors that a fingerprint sketches.

    The sketch is ``S = Vᵀ P`` with a random P of ``width`` columns. All it says about V lies in the span of P, so the
    guess ``P (Pᵀ P)⁻¹ Sᵀ`` catches a share of width / columns of it: 17 % with 64 numbers of 384. Removing it helps
    that much and no more.

    Args:
        name: The parameter.
        columns: Its columns.
        sketch: S, (k, width).
    """
    P = projection(name, columns, sketch.shape[1]).double()
    return _orthonormal(torch.linalg.lstsq(P.T, sketch.double().T, driver="gelsd").solution)


def _orthonormal(vectors: Tensor) -> Tensor:
    return thin_svd(vectors.double())[0].float()
