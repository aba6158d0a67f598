from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.training.difficulty.memorization import (
    accuracy_by_subset,
    auc_of_noise,
    easy_and_hard,
    forgetting_by_difficulty,
)


@given(n=st.integers(10, 80), seed=st.integers(0, 99), groups=st.integers(1, 10))
def test_forgetting_equals_counting(n: int, seed: int, groups: int) -> None:
    generator = np.random.default_rng(seed)
    expert, merged = generator.integers(0, 2, (2, n))
    difficulty = generator.permutation(n).astype(float)
    found = forgetting_by_difficulty(expert, merged, difficulty, groups=groups)
    order = sorted(range(n), key=lambda i: difficulty[i])
    start = 0
    for group in found:
        part = order[start : start + group.n]
        start += group.n
        assert (group.lowest, group.highest) == (difficulty[part[0]], difficulty[part[-1]])
        assert group.expert.value == pytest.approx(sum(expert[i] for i in part) / group.n)
        assert group.merged.value == pytest.approx(sum(merged[i] for i in part) / group.n)
        right = [i for i in part if expert[i]]
        wrong = [i for i in part if not expert[i]]
        if right:
            assert group.forgotten is not None
            assert group.forgotten.value == pytest.approx(sum(not merged[i] for i in right) / len(right))
            assert group.forgotten.n == len(right)
            if len(right) == 1:
                assert (group.forgotten.low, group.forgotten.high) == (None, None), (
                    "one says nothing of others"
                )
            else:
                assert group.forgotten.low <= group.forgotten.value <= group.forgotten.high  # type: ignore[operator]
        else:
            assert group.forgotten is None
        assert (group.gained is None) == (not wrong)
    assert start == n
    assert max(g.n for g in found) - min(g.n for g in found) <= 1


def test_subsets() -> None:
    found = accuracy_by_subset([1, 0, 1, 1], {"easy": [0, 2], "hard": [1], "all": range(4)})
    assert {name: value.value for name, value in found.items()} == {"easy": 1.0, "hard": 0.0, "all": 0.75}
    assert found["all"].n == 4


def test_easy_and_hard_are_the_ends() -> None:
    difficulty = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    found = easy_and_hard(difficulty, share=1 / 3)
    assert (found["easy"].tolist(), found["hard"].tolist()) == ([1, 5], [0, 2])


@given(n=st.integers(2, 40), seed=st.integers(0, 99))
def test_auc_is_the_share_of_pairs_in_order(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    difficulty = generator.integers(0, 5, n).astype(float)
    wrong = generator.choice(n, generator.integers(1, n), replace=False)
    others = [i for i in range(n) if i not in wrong]
    pairs = [
        (difficulty[i] > difficulty[j]) + 0.5 * (difficulty[i] == difficulty[j])
        for i in wrong
        for j in others
    ]
    assert auc_of_noise(difficulty, wrong) == pytest.approx(np.mean(pairs))


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match="`expert` must be 1 or 0"):
        forgetting_by_difficulty([0.5], [1], [1.0], groups=1)
    with pytest.raises(OptionError, match="2, 1 and 2 numbers are not of the same examples"):
        forgetting_by_difficulty([1, 0], [1], [1.0, 2.0])
    with pytest.raises(OptionError, match="`groups` must be from 1 to the number of examples, 2, not 10"):
        forgetting_by_difficulty([1, 0], [1, 0], [1.0, 2.0])
    with pytest.raises(OptionError, match="NaN for some examples"):
        forgetting_by_difficulty([1, 0], [1, 0], [1.0, float("nan")], groups=1)
    with pytest.raises(OptionError, match="the subsets none, far are empty or go beyond the 2"):
        accuracy_by_subset([1, 0], {"none": [], "good": [0], "far": [2]})
    with pytest.raises(OptionError, match=r"`share` must be in \(0, 0.5\]"):
        easy_and_hard([1.0, 2.0], 0.6)
    with pytest.raises(OptionError, match="NaN for some examples"):
        easy_and_hard([1.0, float("nan"), 2.0, 3.0])
    with pytest.raises(OptionError, match="both mislabelled and other examples"):
        auc_of_noise([1.0, 2.0], [0, 1])
    for wrong in (-1, 2):
        with pytest.raises(OptionError, match="`wrong` goes beyond the 2 examples"):
            auc_of_noise([1.0, 2.0], [wrong])
