from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 1 << 16
"""How many probabilities there are: random numbers have 16 bits."""

_PER_COUNT = 16  # one step of the Philox counter gives 4 × 64 random bits: 16 numbers of 16 bits
_WORD = 64  # coins that are tossed at once: bits of a word
_WORDS = 4  # words that one step of the counter gives
_PLANES = 8  # digits of all coins; what they leave undecided, one coin in 2^8, is decided one by one
_FINE = LEVELS >> _PLANES
_PLANE = 1 << 128  # steps of the counter between digits, of 2^256 that there are

Words: TypeAlias = NDArray[np.uint64]


def kept_share(density: float) -> float:
    """The share that a random mask keeps on average: the density on a grid of 1/65536."""
    return max(1, round(density * LEVELS)) / LEVELS


def random_mask(density: float, *, seed: int, slot: int, name: str, start: int, stop: int) -> Tensor:
    """An independent coin for each element: True with probability :func:`kept_share`.

    A function of its arguments alone (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
    coin of an element is the same in whichever piece, process or engine it is drawn. What a smaller density keeps, a
    larger one keeps too.

    Each coin compares a number of 16 binary digits with the density. Digits are drawn for 64 coins at a time, and only
    those that matter: one for a density of 1/2, two for 1/4, and never more than eight, as the few coins whose first
    eight digits equal the density's are decided by hashes of their positions.

    Args:
        density: Probability of True, in (0, 1].
        seed: The user's seed.
        slot: Position of the expert among the experts, so that experts get different masks.
        name: The parameter.
        start: First element, in row-major order of the whole parameter.
        stop: One past the last element.

    Returns:
        A boolean CPU tensor of length ``stop - start``.

    Example:
        >>> whole = random_mask(0.3, seed=0, slot=0, name="layer.weight", start=0, stop=1000)
        >>> bool((random_mask(0.3, seed=0, slot=0, name="layer.weight", start=9, stop=99) == whole[9:99]).all())
        True
    """
    coarse, fine = divmod(round(kept_share(density) * LEVELS), _FINE)
    if coarse == 1 << _PLANES:
        return torch.ones(stop - start, dtype=torch.bool)
    first, count = start // _WORD, -(-stop // _WORD) - start // _WORD
    key = _key(f"{seed}/{slot}/{name}")
    below, equal = _compare(key, coarse, first, count, all_digits=fine > 0)
    coins = np.unpackbits(below.view(np.uint8), bitorder="little").view(np.bool_)
    if fine:
        words = np.flatnonzero(equal)
        bits = np.flatnonzero(np.unpackbits(equal[words].view(np.uint8), bitorder="little").view(np.bool_))
        index = words[bits // _WORD] * _WORD + bits % _WORD
        coins[index] = _hashes(key, index + first * _WORD) < fine
    return torch.from_numpy(coins[start - first * _WORD : stop - first * _WORD])


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _compare(key: int, coarse: int, first: int, count: int, *, all_digits: bool) -> tuple[Words, Words]:
    """Bits of 64 coins a word: whether a coin's number is below ``coarse``, and whether the two are equal.

    From the last digit to the first, where the first that differs decides. Digits behind the last 1 of ``coarse`` do
    not make a number smaller, and are only looked at when ``all_digits`` are wanted.
    """
    last = 0 if all_digits else (coarse & -coarse).bit_length() - 1
    skipped = first % _WORDS
    steps = -(-(skipped + count) // _WORDS)
    generator = np.random.Philox(key=key, counter=last * _PLANE + first // _WORDS)
    below, equal = np.zeros(count, dtype="<u8"), np.full(count, 2**64 - 1, dtype="<u8")
    for digit in range(last, _PLANES):
        zeros = generator.random_raw(steps * _WORDS)[skipped : skipped + count].astype("<u8", copy=False)
        generator.advance(_PLANE - steps)
        if coarse >> digit & 1:  # a number whose digit is 0 is below; one whose digit is 1 may be
            below |= zeros
            np.invert(zeros, out=zeros)
        else:
            below &= zeros
        equal &= zeros
    return below, equal


def _hashes(key: int, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A uniform number below 2^8 for each position (Steele et al., "SplitMix", OOPSLA 2014)."""
    mixed = (index.astype(np.uint64) + np.uint64(key & (2**64 - 1))) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(key >> 64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(64 - (_FINE - 1).bit_length())


def random_numbers(*, seed: int, slot: int, name: str, start: int, stop: int) -> NDArray[np.uint16]:
    """One uniform number below ``LEVELS`` for each element, a function of the arguments alone.

    For methods that have a probability for each element; :func:`random_mask` draws its own digits.
    Arguments are those of :func:`random_mask`.

    >>> whole = random_numbers(seed=0, slot=0, name="layer.weight", start=0, stop=100)
    >>> bool((random_numbers(seed=0, slot=0, name="layer.weight", start=40, stop=60) == whole[40:60]).all())
    True
    """
    first = start // _PER_COUNT
    generator = np.random.Philox(key=_key(f"{seed}/{slot}/{name}"), counter=first)
    words = -(-(stop - first * _PER_COUNT) // _PER_COUNT) * 4
    raw = generator.random_raw(words).astype("<u8", copy=False).view("<u2")
    return raw[start - first * _PER_COUNT : stop - first * _PER_COUNT]
