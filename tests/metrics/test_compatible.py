from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics.compatible import groups, most_compatible


def blocks(sizes: list[int], inside: float, outside: float) -> np.ndarray:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    made = np.where(owner[:, None] == owner[None, :], inside, outside)
    np.fill_diagonal(made, 1.0)
    return made


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_blocks_are_found_whatever_the_order(sizes: list[int], random: object) -> None:
    matrix = blocks(sizes, 0.6, 0.05)
    order = list(range(len(matrix)))
    random.shuffle(order)
    owner = np.repeat(np.arange(len(sizes)), sizes)[order]
    found = groups(matrix[np.ix_(order, order)])
    assert sorted(found.order) == list(range(len(matrix)))
    for i, j in combinations(range(len(matrix)), 2):
        assert (found.group[i] == found.group[j]) == (owner[i] == owner[j])
    counted = [found.group.count(g) for g in range(1, len(sizes) + 1)]
    assert counted == sorted(sizes, reverse=True)
    # Members of a group stand side by side.
    in_order = [found.group[i] for i in found.order]
    assert sum(a != b for a, b in pairwise(in_order)) == len(sizes) - 1
    assert sorted(i for members in found.members() for i in members) == list(range(len(matrix)))


def test_where_groups_part() -> None:
    matrix = blocks([2, 2], 0.6, 0.3)
    assert max(groups(matrix, least=0.29).group) == 1
    assert max(groups(matrix, least=0.31).group) == 2
    assert max(groups(matrix, least=0.61).group) == 4


def test_partners_by_hand() -> None:
    conflict = [
        [0, 0.1, 0.2, 0.3, math.nan],
        [0.1, 0, 0.9, 0.3, 0.9],
        [0.2, 0.9, 0, 0.3, 0.9],
        [0.3, 0.3, 0.3, 0, 0.9],
        [math.nan, 0.9, 0.9, 0.9, 0],
    ]
    cosine = np.zeros((5, 5))
    # 4 shares nothing with 0 and comes first; then 1 (0.1 + 0.9) before 2 (0.2 + 0.9) and 3 (0.3 + 0.9); then 3, not 2.
    assert most_compatible(conflict, cosine, 0, 3) == [4, 1, 3]
    assert most_compatible(conflict, cosine, 0, 9, among=[1, 2, 3]) == [1, 3, 2]


def test_ties_go_to_the_larger_cosine() -> None:
    conflict = np.full((4, 4), 0.5)
    cosine = np.eye(4)
    cosine[0, 2] = cosine[2, 0] = 0.3
    assert most_compatible(conflict, cosine, 0, 3) == [2, 1, 3]


def test_wrong_arguments() -> None:
    square = np.eye(3)
    with pytest.raises(OptionError, match="least"):
        groups(square, least=1.5)
    with pytest.raises(OptionError, match="square"):
        groups(square[:2])
    with pytest.raises(OptionError, match="index"):
        most_compatible(square, square, 3, 1)
    with pytest.raises(OptionError, match="count"):
        most_compatible(square, square, 0, 0)
