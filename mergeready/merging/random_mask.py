from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 1 << 16
"""How many probabilities there are: random numbers have 16 bits."""

_PER_COUNT = 16  # one step of the Philox counter gives 4 × 64 random bits: 16 numbers of 16 bits


def kept_share(density: float) -> float:
    """The share that a random mask keeps on average: the density on a grid of 1/65536."""
    return max(1, round(density * LEVELS)) / LEVELS


def random_mask(density: float, *, seed: int, slot: int, name: str, start: int, stop: int) -> Tensor:
    """An independent coin for each element: True with probability :func:`kept_share`.

    A function of its arguments alone (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
    coin of an element is the same in whichever piece, process or engine it is drawn.

    Args:
        density: Probability of True, in (0, 1].
        seed: The user's seed.
        slot: Position of the expert among the experts, so that experts get different masks.
        name: The parameter.
        start: First element, in row-major order of the whole parameter.
        stop: One past the last element.

    Returns:
        A boolean CPU tensor of length ``stop - start``.
    """
    numbers = random_numbers(seed=seed, slot=slot, name=name, start=start, stop=stop)
    return torch.from_numpy(numbers < round(kept_share(density) * LEVELS))


def random_numbers(*, seed: int, slot: int, name: str, start: int, stop: int) -> NDArray[np.uint16]:
    """One uniform number below ``LEVELS`` for each element, a function of the arguments alone.

    What :func:`random_mask` compares with one density, for methods that have a probability for each element.
    Arguments are those of :func:`random_mask`.

    >>> whole = random_numbers(seed=0, slot=0, name="layer.weight", start=0, stop=100)
    >>> bool((random_numbers(seed=0, slot=0, name="layer.weight", start=40, stop=60) == whole[40:60]).all())
    True
    """
    key = hashlib.blake2b(f"{seed}/{slot}/{name}".encode(), digest_size=16).digest()
    first = start // _PER_COUNT
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=first)
    words = -(-(stop - first * _PER_COUNT) // _PER_COUNT) * 4
    raw = generator.random_raw(words).astype("<u8", copy=False).view("<u2")
    return raw[start - first * _PER_COUNT : stop - first * _PER_COUNT]
