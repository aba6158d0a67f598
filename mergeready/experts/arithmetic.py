"""Task vectors made from task vectors, lazily."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeready.experts.delta import Delta, Dense, LowRank
from mergeready.experts.sums import inner_products
from mergeready.experts.task_vector import TaskVector, require_finite
from mergeready.weights.source import chunk_ranges


class Difference(TaskVector):
    """``τ₁ − τ₂``: what a run added between two of its steps.

    Args:
        first: The minuend.
        second: The subtrahend, on the same base.
        label: How messages call it.

    Raises:
        BaseMismatchError: If the two are of different bases.

    Example:
        >>> from mergeready.experts import open_expert
        >>> base = {"x": torch.zeros(2)}
        >>> end, pick = (open_expert({"x": torch.tensor(x)}, base).vector for x in ([3.0, 1.0], [1.0, 1.0]))
        >>> Difference(end, pick).flat("x", 0, 2)
        tensor([2., 0.])
    """

    def __init__(self, first: TaskVector, second: TaskVector, label: str | None = None) -> None:
        first.base.require_same(second.base, second.label)
        self.label = label or f"{first.label} − {second.label}"
        self.base, self.differs_from = first.base, first.differs_from
        self.infos = {**first.infos, **second.infos}
        self._first, self._second = first, second

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        if name not in self._second:
            return self._first.flat(name, start, stop, base)
        taken = self._second.flat(name, start, stop, base)
        if name not in self._first:
            return taken.neg_()
        values = self._first.flat(name, start, stop, base)
        return values.sub_(taken.to(values.device))

    def __getitem__(self, name: str) -> Delta:
        first, second = (vector.get(name) for vector in (self._first, self._second))
        if isinstance(first, LowRank) and isinstance(second, LowRank):
            B, A = second.B.to(first.B.device), second.A.to(first.A.device)
            return LowRank(torch.cat([first.B, B], dim=1), torch.cat([first.A, -A], dim=0), first.shape)
        if first is not None and second is None:
            return first
        info = self.infos[name]
        return Dense(self.flat(name, 0, info.numel).reshape(info.shape))


class Without(TaskVector):
    """A task vector with another's direction projected out of each parameter: ``τ − (⟨τ, d⟩ / ⟨d, d⟩) d``.

    Parameters that d does not change stay as they are. Reads both once, for the products.

    Args:
        vector: What is projected.
        direction: What is taken out, on the same base.
        label: How messages call it.

    Raises:
        BaseMismatchError: If the two are of different bases.
        NonFiniteError: If either holds NaN or infinite values.

    Example:
        >>> from mergeready.experts import open_expert
        >>> base, values = {"x": torch.zeros(2)}, torch.tensor([3.0, 1.0])
        >>> vector = open_expert({"x": values}, base).vector
        >>> Without(vector, open_expert({"x": torch.tensor([2.0, 0.0])}, base).vector).flat("x", 0, 2)
        tensor([0., 1.])
    """

    def __init__(self, vector: TaskVector, direction: TaskVector, label: str | None = None) -> None:
        vector.base.require_same(direction.base, direction.label)
        self.label = label or f"{vector.label} without {direction.label}"
        self.base, self.differs_from = vector.base, vector.differs_from
        self.infos = vector.infos
        self._vector, self._direction = vector, direction
        self._factors: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for name, info in vector.infos.items():
            if name not in direction:
                continue
            products = torch.zeros(2, 2, dtype=torch.float64)
            for start, stop in chunk_ranges(info):
                own = vector.flat(name, start, stop)
                pieces = torch.stack([own, direction.flat(name, start, stop).to(own.device)])
                products += inner_products(pieces, pieces)
            sizes[name] = float(products.trace())
            if products[1, 1] > 0:
                self._factors[name] = float(products[0, 1] / products[1, 1])
        require_finite(self.label, sizes)

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        values = self._vector.flat(name, start, stop, base)
        if name in self._factors:
            taken = self._direction.flat(name, start, stop, base).to(values.device)
            values.sub_(taken, alpha=self._factors[name])
        return values

    def __getitem__(self, name: str) -> Delta:
        if name not in self._factors:
            return self._vector[name]
        info = self.infos[name]
        return Dense(self.flat(name, 0, info.numel).reshape(info.shape))
