"""Nearest experts among very many, by an approximate index instead of all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.all_pairs import ROWS
from mergeready.metrics.sampled_block import Layout, SampledBlock, open_sampled
from mergeready.weights.atomic import new_file

WIDTH = 4096
"""Numbers that each expert is projected to: 16 kB, and a standard error of 1/64 of its cosines."""
_LINKS = 32
_EFFORT = 200


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest experts of each expert.

    Attributes:
        labels: The experts.
        nearest: Indices of the nearest others, nearest first; shape (n, k).
        cosine: Their cosines, from projections; shape (n, k).
        error: Standard error of a cosine near 0 from projecting alone; the fingerprints' own comes on top.
    """

    labels: list[str]
    nearest: NDArray[np.int64]
    cosine: NDArray[np.float32]
    error: float


@torch.no_grad()
def nearest_experts(
    fingerprints: Sequence[str | Path | Fingerprint],
    count: int,
    *,
    base: Base | None = None,
    width: int = WIDTH,
) -> Neighbours:
    """The most similar others of each expert, by cosine, for numbers of experts that n × n matrices do not suit.

    Samples become one vector an expert whose inner products are the estimated cosines, a count sketch makes them
    shorter (Charikar, Chen & Farach-Colton, ICALP 2002), and faiss looks for neighbours in a graph (HNSW, Malkov &
    Yashunin, arXiv 1603.09320), which finds nearly all true ones. Time grows as n log n; memory is 4 · ``width`` bytes
    an expert and its links.

    Args:
        fingerprints: Fingerprints or their files.
        count: How many neighbours of each.
        base: Their base, to check each against.
        width: Numbers that each expert is projected to.

    Raises:
        UnsupportedError: If faiss is not installed.
        OptionError: If ``count`` is not between 1 and the number of others.
        BaseMismatchError: If the bases differ.
    """
    try:
        import faiss
    except ImportError as error:
        raise UnsupportedError(
            "looking for neighbours needs faiss: pip install 'mergeready[faiss]'. "
            "Without it, all pairs can be compared."
        ) from error
    if not 1 <= count < len(fingerprints):
        raise OptionError(f"`count` must be 1 to {len(fingerprints) - 1}, the number of others, not {count}.")
    experts = open_sampled(fingerprints, base)
    layout = Layout.of(experts)
    vectors = np.concatenate(
        [
            _sketch(SampledBlock(experts[start : start + ROWS], layout), layout, width).numpy()
            for start in range(0, len(experts), ROWS)
        ]
    )
    index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EFFORT
    index.hnsw.efSearch = max(_EFFORT, 2 * count)
    index.add(vectors)
    _, nearest = index.search(vectors, count + 1)
    others = np.empty((len(experts), count), dtype=np.int64)
    for i, row in enumerate(nearest):
        known = row[(row != i) & (row >= 0)][:count]
        others[i] = known if len(known) == count else _others(vectors, i, count)
    return Neighbours(
        labels=[expert.label for expert in experts],
        nearest=others,
        cosine=np.stack([vectors[row] @ vectors[i] for i, row in enumerate(others)]),
        error=1 / math.sqrt(width),
    )


def _others(vectors: NDArray[np.float32], index: int, count: int) -> NDArray[np.int64]:
    """The nearest others by all inner products: where many experts are one, the graph's links do not lead away."""
    cosine = vectors @ vectors[index]
    cosine[index] = -np.inf
    return np.argsort(-cosine, kind="stable")[:count]


def _sketch(block: SampledBlock, layout: Layout, width: int) -> Tensor:
    """Each coordinate goes to one of ``width`` sums, with a sign of its own; the same for all experts."""
    generator = torch.Generator().manual_seed(layout.width)
    sums = torch.zeros(len(block), width)
    for index, place in enumerate(layout.places):
        bucket = torch.randint(width, (place.count,), generator=generator)
        sign = torch.randint(2, (place.count,), generator=generator) * 2.0 - 1
        unit, _ = block.columns(index, place.start, place.stop)
        sums.index_add_(1, bucket, unit * block.weights[:, index, None] * sign)
    return sums


def write_neighbours(path: str | Path, found: Neighbours) -> Path:
    """Write a Parquet table, one row an expert and neighbour: ``expert``, ``rank`` from 1, ``neighbour``, ``cosine``.

    Raises:
        OSError: If it cannot be written; an older file is left as it was then.
    """
    import pyarrow
    from pyarrow import parquet

    count, width = found.nearest.shape
    labels = np.array(found.labels, dtype=object)
    table = pyarrow.table(
        {
            "expert": np.repeat(labels, width),
            "rank": np.tile(np.arange(1, width + 1), count),
            "neighbour": labels[found.nearest.reshape(-1)],
            "cosine": found.cosine.reshape(-1),
        }
    )
    with new_file(Path(path)) as temporary:
        parquet.write_table(table, temporary)
    return Path(path)
