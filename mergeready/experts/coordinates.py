"""Which coordinates of a parameter a fingerprint holds: the same ones for every expert of a base."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

LEAST = 64
"""Coordinates that even a small parameter gives, so that it can be judged on its own."""


def sample_count(numel: int, total: int, budget: int) -> int:
    """How many coordinates of a parameter are sampled: its share of the budget, at least 64, all where there are fewer.

    Args:
        numel: Elements of the parameter.
        total: Elements of all parameters of the base together.
        budget: Coordinates of the whole model.

    >>> sample_count(500_000, 1_000_000, 1000), sample_count(1000, 1_000_000, 1000), sample_count(10, 1_000_000, 1000)
    (500, 64, 10)
    """
    return min(numel, max(LEAST, math.ceil(budget * numel / max(total, 1))))


def coordinates(name: str, numel: int, count: int) -> Tensor:
    """The sampled coordinates of a parameter: flat indices, int64, a function of name and size alone.

    All of them where ``count`` reaches ``numel``. Else drawn with replacement from a counter-based generator keyed by
    the name (Salmon et al., SC 2011), so that more coordinates begin with those of a smaller sample.

    >>> coordinates("layer.weight", 1000, 3).tolist() == coordinates("layer.weight", 1000, 5).tolist()[:3]
    True
    """
    if count >= numel:
        return torch.arange(numel)
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(count)
    return torch.from_numpy((raw % np.uint64(numel)).astype(np.int64))


def projection(name: str, columns: int, width: int) -> Tensor:
    """A random matrix ``(columns, width)`` of ±1/√width, fp32, a function of its arguments alone.

    Inner products of vectors stay what they are on average (Achlioptas, "Database-friendly random projections", 2003).
    """
    key = int.from_bytes(hashlib.blake2b(f"projection/{name}".encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(-(-columns * width // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), bitorder="little")[: columns * width]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(columns, width) / math.sqrt(width)
