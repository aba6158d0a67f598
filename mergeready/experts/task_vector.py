from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, listing
from mergeready.experts.delta import Delta, Dense
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.stored import Rounded, is_coarse
from mergeready.experts.sums import squared_norm
from mergeready.weights.source import TensorInfo, WeightSource, chunk_ranges


class TaskVector(Mapping[str, Delta]):
    """τ = expert − base: a lazy mapping from base parameter name to that parameter's delta.

    A name that is not in the mapping has no change. Values are computed at each access and never kept.

    Attributes:
        label: How messages call the expert.
        base: Identity of the base that the deltas are relative to.
        infos: Shape and dtype of each parameter *in the base*.
        differs_from: Source of the base's values where deltas are differences from them, for whoever reads several
            experts and wants to read those only once.
        memory: Where merge methods keep what they found out about it, such as thresholds. None, unless whoever
            made it vouches that its values do not change.
    """

    label: str
    base: BaseIdentity
    infos: Mapping[str, TensorInfo]
    differs_from: WeightSource | None = None
    memory: dict[tuple[Any, ...], Any] | None = None

    @abstractmethod
    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of one delta in row-major order, as a new fp32 tensor.

        ``base`` may give the base's values there, so that several experts need not read them again.
        """

    def rounded(self) -> Mapping[str, Rounded]:
        """The parameters whose expert is known in a coarser format than fp32 only, and how it was rounded."""
        return {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


def has_room(memory: dict[tuple[Any, ...], Any], kind: str, elements: int, most: int) -> bool:
    """Whether a task vector's memory may keep so many more elements of a kind, ``most`` in all; then they are counted.

    >>> memory = {}
    >>> has_room(memory, "masks", 3, 4), has_room(memory, "masks", 3, 4), has_room(memory, "triples", 3, 4)
    (True, False, True)
    """
    key = (kind, "elements remembered")
    elements += memory.get(key, 0)
    if elements > most:
        return False
    memory[key] = elements
    return True


class FullTaskVector(TaskVector):
    """The difference of two sources of weights, read piece by piece.

    Args:
        expert: Source of the fine-tuned weights.
        base: Source of the base weights.
        names: Base name to expert name, for every parameter that is compared.
        identity: Identity of the base.
        label: How messages call the expert.
    """

    def __init__(
        self,
        expert: WeightSource,
        base: WeightSource,
        names: Mapping[str, str],
        identity: BaseIdentity,
        label: str | None = None,
    ) -> None:
        self.label = label or expert.label
        self.base = identity
        self._expert, self.differs_from, self._names = expert, base, names
        self._base = base
        self.infos = {name: base.infos[name] for name in names}

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        stored = self._expert.read_flat(self._names[name], start, stop)
        fine_tuned = stored.float()
        if base is None:
            base = self._base.read_flat(name, start, stop)
        base = base.to(device=fine_tuned.device, dtype=torch.float32)
        return fine_tuned - base if fine_tuned is stored else fine_tuned.sub_(base)

    def rounded(self) -> Mapping[str, Rounded]:
        dtypes = {name: self._expert.precision(own) for name, own in self._names.items()}
        return {name: Rounded(dtype, "weights") for name, dtype in dtypes.items() if is_coarse(dtype)}

    def __getitem__(self, name: str) -> Dense:
        info = self.infos[name]
        return Dense(self.flat(name, 0, info.numel).reshape(info.shape))


class DeltaTaskVector(TaskVector):
    """Deltas that are held in memory by name: small ones, or ones made for a purpose."""

    def __init__(
        self, deltas: Mapping[str, Delta], infos: Mapping[str, TensorInfo], base: BaseIdentity, label: str
    ) -> None:
        self.label, self.base = label, base
        self.infos = {name: infos[name] for name in deltas}
        self._deltas = dict(deltas)

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._deltas[name].flat(start, stop).clone()

    def __getitem__(self, name: str) -> Delta:
        return self._deltas[name]


def squared_norms(vector: TaskVector) -> dict[str, float]:
    """‖τ‖² per parameter, read once from front to back.

    Raises:
        NonFiniteError: If values are NaN or infinite; all offending parameters are listed.
    """
    sums: dict[str, float] = {}
    for name, info in vector.infos.items():
        total = 0.0
        for start, stop in chunk_ranges(info):
            total += squared_norm(vector.flat(name, start, stop))
        sums[name] = total
    require_finite(vector.label, sums)
    return sums


def require_finite(label: str, sums: Mapping[str, float]) -> None:
    """Raise, naming every parameter whose sum of squares is not a number that fp32 can hold.

    Raises:
        NonFiniteError: If there is one.
    """
    broken = [name for name, value in sums.items() if not value < float("inf")]
    if broken:
        raise NonFiniteError(
            f"{label} holds NaN or infinite values in {listing(broken)}. "
            "Its training diverged or its file is damaged; use an earlier checkpoint."
        )
