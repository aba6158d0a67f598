from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, Dense
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.source import TensorInfo, chunk_ranges


def read_all(vectors: Sequence[TaskVector], name: str, start: int, stop: int) -> list[Tensor]:
    """Elements ``start`` to ``stop`` of every expert's delta, new fp32 tensors on one device.

    Where several experts are differences from one source, its values are read once. Zeros where an expert has no
    delta; at least one must have one.
    """
    having = [vector for vector in vectors if name in vector]
    source = next((v.differs_from for v in having if v.differs_from is not None), None)
    base = None
    if source is not None and len(having) > 1:
        base = source.read_flat(name, start, stop).float()
    read: list[Any] = [
        vector.flat(name, start, stop, base if vector.differs_from is source else None)
        if name in vector
        else None
        for vector in vectors
    ]
    device = next(values.device for values in read if values is not None)
    return [
        torch.zeros(stop - start, device=device) if values is None else values.to(device) for values in read
    ]


class HeldDeltas:
    """The deltas of one parameter, read once for a method that looks at them several times.

    They are read in the pieces in which every engine reads, so that values are the same whether they are held or not.

    Args:
        vectors: The experts' task vectors.
        name: The parameter.
        info: Its shape.
    """

    def __init__(self, vectors: Sequence[TaskVector], name: str, info: TensorInfo) -> None:
        self._ranges = list(chunk_ranges(info))
        self._pieces = [read_all(vectors, name, start, stop) for start, stop in self._ranges]

    def read(self, start: int, stop: int) -> list[Tensor]:
        """As :func:`read_all`, but the values may be the held ones: whoever overwrites them must be the last to ask."""
        found = [
            [values[max(start - first, 0) : stop - first] for values in pieces]
            for (first, last), pieces in zip(self._ranges, self._pieces, strict=True)
            if first < stop and start < last
        ]
        return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]


class HeldVector(TaskVector):
    """One expert's task vector, of which one parameter is held; it reads that and has no other."""

    def __init__(self, vector: TaskVector, name: str, held: HeldDeltas, slot: int) -> None:
        self.label, self.base, self.infos = vector.label, vector.base, {name: vector.infos[name]}
        self._held, self._slot = held, slot

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._held.read(start, stop)[self._slot].clone()

    def __getitem__(self, name: str) -> Delta:
        info = self.infos[name]
        return Dense(self.flat(name, 0, info.numel).reshape(info.shape))
