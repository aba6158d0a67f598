"""Random task vectors cut into chunks, for every accumulator's tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense, TaskVector
from mergeready.metrics import Accumulator, Chunk, accumulate
from mergeready.weights import StateDictSource
from mergeready.weights.source import CHUNK_ELEMENTS

Values = dict[str, Tensor]

KINDS = ("normal", "heavy tails", "ties", "sparse", "zero")
SCALES = (1e-12, 1e-3, 1.0, 1e6)
SHAPES = ((), (1,), (3, 4), (2, 0), (50, 30), (7, 11, 3))


def values(shape: tuple[int, ...], kind: str, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    made = {
        "normal": lambda: normal,
        "heavy tails": lambda: normal.tan(),
        "ties": lambda: normal.round(),
        "sparse": lambda: normal * (torch.rand(shape, generator=generator) < 0.1),
        "zero": lambda: torch.zeros(shape),
    }[kind]()
    return (made * scale).float()


@st.composite
def experts(draw: st.DrawFn, most: int = 4) -> list[Values]:
    """Some task vectors on one base, as values by name; scales may differ from expert to expert."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    seed = draw(st.integers(0, 999))
    found: list[Values] = []
    for expert in range(draw(st.integers(1, most))):
        kind, scale = draw(st.sampled_from(KINDS)), draw(st.sampled_from(SCALES))
        found.append({f"p{i}": values(s, kind, scale, seed + 100 * expert + i) for i, s in enumerate(shapes)})
    return found


def long_experts(count: int = 3) -> list[Values]:
    """One parameter of several chunks, the last of them short."""
    shape = (CHUNK_ELEMENTS // 64 + 5, 128)
    return [{"long": values(shape, KINDS[i % 2], 1.0, i)} for i in range(count)]


def base_of(tensors: Values) -> StateDictSource:
    return StateDictSource({name: values(tuple(t.shape), "normal", 1.0, 7) for name, t in tensors.items()})


def task_vectors(found: Sequence[Values]) -> list[TaskVector]:
    infos = StateDictSource(found[0]).infos
    identity = BaseIdentity({})
    return [
        DeltaTaskVector({n: Dense(v) for n, v in e.items()}, infos, identity, f"expert {i}")
        for i, e in enumerate(found)
    ]


def feed(accumulator: Accumulator, found: Sequence[Values]) -> Accumulator:
    accumulate(task_vectors(found), base_of(found[0]), [accumulator])
    return accumulator


def flat(found: Sequence[Values]) -> Tensor:
    """All values as float64, one expert a row."""
    return torch.stack([torch.cat([v.double().reshape(-1) for v in e.values()]) for e in found])


def pieces(found: Sequence[Values], cuts: Sequence[float]) -> list[Chunk]:
    """The same values, cut at other places than the library's own."""
    base = base_of(found[0])
    chunks: list[Chunk] = []
    for name, tensor in found[0].items():
        count = tensor.numel()
        borders = sorted({0, count, *(int(cut * count) for cut in cuts)})
        for start, stop in pairwise(borders):
            deltas = [e[name].reshape(-1)[start:stop] for e in found]
            chunks.append(Chunk(name, base.read_flat(name, start, stop), deltas, start))
    return chunks


def in_parts(
    accumulators: Sequence[Accumulator], found: Sequence[Values], cuts: Sequence[float]
) -> Accumulator:
    """Deal the pieces out to several accumulators, and merge these into the first."""
    for index, chunk in enumerate(pieces(found, cuts)):
        accumulators[index % len(accumulators)].update(chunk)
    for other in accumulators[1:]:
        accumulators[0].merge(other)
    return accumulators[0]


cuts = st.lists(st.floats(0, 1), max_size=5)
