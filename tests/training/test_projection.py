"""Removing peers' subspaces: idempotent, orthogonal, and as an SVD in float64 says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.coordinates import projection
from mergeready.experts.delta import Dense, LowRank
from mergeready.training.projection import Subspaces, peer_subspaces, sketched_right


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    peers=st.integers(1, 3),
    rank=st.integers(1, 4),
    sides=st.sampled_from(["left", "right", "either"]),
    seed=st.integers(0, 99),
)
def test_removal_is_idempotent_orthogonal_and_never_longer(
    rows: int, columns: int, peers: int, rank: int, sides: str, seed: int
) -> None:
    found = peer_subspaces([Dense(normal(rows, columns, seed=seed + i)) for i in range(peers)], rank, sides)
    change = normal(rows, columns, seed=seed + 50)
    kept = found.remove(change)
    torch.testing.assert_close(found.remove(kept), kept, rtol=1e-4, atol=1e-5)
    assert abs(float((kept * (change - kept)).sum())) < 1e-4 * float(change.square().sum())
    assert float(kept.norm()) <= float(change.norm()) * (1 + 1e-5)
    if found.left is not None:
        assert float((found.left.T @ kept).norm()) < 1e-4
        torch.testing.assert_close(
            found.left.T @ found.left, torch.eye(found.left.shape[1]), rtol=1e-4, atol=1e-5
        )
    if found.right is not None:
        assert float((kept @ found.right).norm()) < 1e-4


def test_the_leading_singular_vectors_are_what_goes() -> None:
    peer, change = normal(7, 5), normal(7, 5, seed=1)
    U, _, Vh = torch.linalg.svd(peer.double())
    found = peer_subspaces([Dense(peer)], 2, "either")
    left, right = torch.eye(7) - U[:, :2] @ U[:, :2].T, torch.eye(5) - Vh[:2].T @ Vh[:2]
    torch.testing.assert_close(
        found.remove(change).double(), left @ change.double() @ right, rtol=1e-4, atol=1e-5
    )
    assert peer_subspaces([Dense(peer)], 2).left is None
    assert peer_subspaces([Dense(peer)], 2, "left").right is None


def test_low_rank_peers_are_as_dense_ones() -> None:
    B, A = normal(30, 2), normal(2, 20, seed=1)
    change = normal(30, 20, seed=2)
    first = peer_subspaces([LowRank(B, A, (30, 20)), None], 4, "either").remove(change)
    second = peer_subspaces([Dense(B @ A), None], 4, "either").remove(change)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_without_peers_nothing_goes() -> None:
    change = normal(3, 4)
    for deltas in ([], [None], [Dense(torch.zeros(3, 4))]):
        assert torch.equal(peer_subspaces(deltas, 2).remove(change), change)
    assert torch.equal(Subspaces().remove(change), change)
    with pytest.raises(OptionError, match="`rank`"):
        peer_subspaces([], 0)


@pytest.mark.parametrize("columns", [64, 256, 512])
def test_a_sketch_tells_as_much_as_it_holds(columns: int) -> None:
    """A random subspace of which 64 numbers a vector are known is found to 64 / columns."""
    V = torch.linalg.qr(normal(columns, 4)).Q
    guess = sketched_right("w", columns, V.T @ projection("w", columns, 64))
    caught = float((guess.T @ V).square().sum()) / 4
    assert abs(caught - 64 / columns) < 0.1
