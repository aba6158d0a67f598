from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.merging.random_mask import LEVELS, kept_share, random_mask, random_numbers

COUNT = 200_000
densities = st.floats(1e-6, 1)


def mask(density: float = 0.3, stop: int = COUNT, start: int = 0, **other: object) -> Tensor:
    settings = {"seed": 0, "slot": 0, "name": "layer.weight"} | other
    return random_mask(density, start=start, stop=stop, **settings)


@given(density=densities, start=st.integers(0, 3000), length=st.integers(0, 500), seed=st.integers(0, 2**40))
def test_the_coin_of_an_element_does_not_depend_on_the_piece(
    density: float, start: int, length: int, seed: int
) -> None:
    whole = mask(density, 3500, seed=seed)
    assert whole.dtype == torch.bool
    assert torch.equal(mask(density, start + length, start, seed=seed), whole[start : start + length])


@given(cuts=st.lists(st.integers(0, 1000), max_size=10))
def test_pieces_make_the_whole(cuts: list[int]) -> None:
    borders = sorted({0, 1000, *cuts})
    pieces = [mask(0.5, b, a) for a, b in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(pieces), mask(0.5, 1000))


def test_far_into_a_huge_parameter() -> None:
    start = 2**36 + 5
    piece = mask(0.5, start + 100, start)
    assert torch.equal(mask(0.5, start + 60, start + 40), piece[40:60])


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_share_is_right_within_five_sigma(density: float, seed: int) -> None:
    share = kept_share(density)
    kept = int(mask(density, seed=seed).sum())
    assert abs(kept - COUNT * share) < 5 * math.sqrt(COUNT * share * (1 - share))


def test_coins_of_neighbours_are_independent() -> None:
    drawn = mask(0.5).float() - 0.5
    for lag in (1, 2, 4, 8, 15, 16, 17, 64):
        correlation = float((drawn[lag:] * drawn[:-lag]).mean()) * 4
        assert abs(correlation) < 5 / math.sqrt(COUNT - lag)


def test_masks_of_different_arguments_are_uncorrelated() -> None:
    settings = [
        {"seed": 0},
        {"seed": 1},
        {"slot": 1},
        {"slot": 2},
        {"seed": 1, "slot": 1},
        {"name": "layer.bias"},
        {"name": "layer.weigh"},
        {"seed": -1},
        {"seed": 11, "slot": 1},
        {"seed": 1, "slot": 11},
    ]
    drawn = [mask(0.5, **other).float() - 0.5 for other in settings]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.equal(a, b)
        assert abs(float((a * b).mean()) * 4) < 5 / math.sqrt(COUNT)


def test_a_larger_density_keeps_what_a_smaller_one_kept() -> None:
    small, large = mask(0.2), mask(0.6)
    assert bool((large | ~small).all())


def test_the_same_mask_in_every_process() -> None:
    code = (
        "from mergeready.merging.random_mask import random_mask;"
        "print(''.join('01'[int(x)] for x in random_mask(0.5, seed=3, slot=1, name='x', start=5, stop=105)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ours = random_mask(0.5, seed=3, slot=1, name="x", start=5, stop=105)
    assert other.strip() == "".join("01"[int(x)] for x in ours)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    mask()
    assert torch.equal(torch.rand(1), expected)


@given(density=densities)
def test_kept_share_is_the_density_on_its_grid(density: float) -> None:
    share = kept_share(density)
    assert 0 < share <= 1
    assert (share * 65536).is_integer()
    assert abs(share - density) <= 1 / 65536


@pytest.mark.parametrize("density", [1.0, 0.9999999])
def test_density_one_keeps_everything(density: float) -> None:
    assert kept_share(density) == 1
    assert bool(mask(density).all())


def numbers(start: int = 0, stop: int = COUNT, **other: object) -> Tensor:
    settings = {"seed": 0, "slot": 0, "name": "layer.weight"} | other
    return torch.from_numpy(random_numbers(start=start, stop=stop, **settings).astype("int64"))


@given(start=st.integers(0, 300), length=st.integers(0, 300), slot=st.integers(0, 9))
def test_the_number_of_an_element_does_not_depend_on_the_piece(start: int, length: int, slot: int) -> None:
    whole = numbers(0, 600, slot=slot)
    assert torch.equal(numbers(start, start + length, slot=slot), whole[start : start + length])


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean, which is the number of degrees of freedom."""
    freedom = counts.numel() - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


def kept_between(borders: list[int], **other: object) -> Tensor:
    """How many coins are heads at each density of a rising list, given in 1/65536, but not at the one before it."""
    kept = torch.tensor([float(mask(border / LEVELS, **other).sum()) for border in borders])
    return torch.diff(kept, prepend=torch.zeros(1))


@pytest.mark.parametrize("start", [0, 10**9 + 7])
def test_all_sixteen_digits_of_a_coin_are_uniform(start: int) -> None:
    borders = [*range(700, LEVELS, 701), LEVELS]  # 701 is odd: every digit of the density takes both values
    counts = kept_between(borders, start=start, stop=start + COUNT)
    widths = torch.diff(torch.tensor(borders, dtype=torch.float64), prepend=torch.zeros(1))
    assert abs(chi_square(counts, COUNT * widths / LEVELS)) < 5


def test_what_the_first_eight_digits_leave_open_is_decided_by_fair_coins() -> None:
    stop = 3_000_000
    borders = [100 * 256 + low for low in range(0, 257, 32)]
    counts = kept_between(borders, stop=stop)[1:]
    assert abs(chi_square(counts, torch.full((8,), stop / 2048))) < 5


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_pairs_of_coins_are_independent(density: float) -> None:
    """Between neighbours and far neighbours, experts, names and seeds: all four outcomes as often as they should be."""
    drawn = mask(density)
    others = [torch.roll(drawn, lag) for lag in (1, 2, 63, 64, 65, 128, 256, 4096)]
    others += [mask(density, slot=1), mask(density, slot=2), mask(density, name="x"), mask(density, seed=1)]
    share = kept_share(density)
    pair = torch.tensor([(1 - share) ** 2, share * (1 - share), share * (1 - share), share**2])
    for other in others:
        counts = torch.bincount(drawn.long() * 2 + other.long(), minlength=4).double()
        assert abs(chi_square(counts, COUNT * pair)) < 6


def test_masks_stay_the_same_for_ever() -> None:
    """A probe of a resumed run must draw what it drew before, with later versions too."""
    halves, thirds = (
        random_mask(density, seed=3, slot=1, name="x", start=0, stop=32) for density in (0.5, 0.3)
    )
    assert "".join("01"[int(coin)] for coin in halves) == "01100100010111010110101001100111"
    assert "".join("01"[int(coin)] for coin in thirds) == "00000100010010010100001001000111"


def test_numbers_are_uniform() -> None:
    drawn = numbers()
    assert 0 <= int(drawn.min()) < int(drawn.max()) < LEVELS
    counts = torch.bincount(drawn * 100 // LEVELS, minlength=100)
    # Five standard deviations of a binomial count.
    assert float((counts - COUNT / 100).abs().max()) < 5 * math.sqrt(COUNT / 100)
