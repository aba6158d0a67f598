from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, OptionError
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.information import Information, InformationLike, require_shares
from mergeready.merging.method import ElementwiseMethod, Place, weighted_sum
from mergeready.merging.registry import register
from mergeready.weights.source import chunk_ranges


@register
@dataclass(frozen=True, kw_only=True)
class Fisher(ElementwiseMethod):
    """The mean of the experts, each element weighted by how much the expert's predictions depend on it.

    ``Σ wᵢ Fᵢ τᵢ / Σ wᵢ Fᵢ``, element by element, where ``Fᵢ`` is the diagonal of expert i's Fisher information on its
    own data (:func:`mergeready.training.curvature.fisher_information`). Matena and Raffel, "Merging Models with
    Fisher-Weighted Averaging" (arXiv 2111.09832), section 3, seen from the base, which the mean does not move.

    Where all ``wᵢ Fᵢ`` are zero, as in rows of an embedding that no example used, the result is the mean weighted by
    ``wᵢ`` alone. ``wᵢ`` must not be negative. An expert that neither changes a parameter nor has a Fisher
    information of it has no say there.

    Attributes:
        fisher: One source an expert, in their order: files, dicts of tensors, or what ``fisher_information`` returned.
        floor: Smallest Fisher value, in the unit of the squared gradient of an example's log-likelihood. The authors'
            code uses 1e-6; where most values lie below the floor, the merge is a plain average.
        normalise: Divide each expert's Fisher information by its Euclidean norm over all parameters, so that an
            expert that is sure of its predictions, and so has small gradients, counts as much as one that is not.
    """

    name: ClassVar[str] = "fisher"
    fisher: InformationLike
    floor: float = 0.0
    normalise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.floor, int | float) or not 0 <= self.floor < math.inf:
            raise OptionError(f"`floor` must be a finite number of at least 0, not {self.floor!r}.")
        if not isinstance(self.normalise, bool):  # text such as "no" would count as true
            raise OptionError(f"`normalise` must be true or false, not {self.normalise!r}.")
        object.__setattr__(self, "fisher", Information.open(self.fisher, "fisher"))

    @property
    def _information(self) -> Information:
        return Information.open(self.fisher, "fisher")

    @cached_property
    def _norms(self) -> list[float]:
        return [_norm(self._information, slot) for slot in range(len(self._information))]

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "fisher": self._information.describe(),
            "floor": self.floor,
            "normalise": self.normalise,
        }

    def check(self, vectors: Sequence[TaskVector], names: Sequence[str], weights: Sequence[float]) -> None:
        require_shares(self.name, weights)
        self._information.require_fit(vectors)
        infos = {name: vector.infos[name] for vector in vectors for name in vector}
        self._information.require_shapes(vectors, ((name, name, infos[name].shape) for name in names))

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        shares = [
            self._importance(slot, place, delta).mul_(weight)
            for slot, (delta, weight) in enumerate(zip(deltas, weights, strict=True))
        ]
        # Fisher values span many orders of magnitude: relative to the largest, their products cannot underflow.
        largest = torch.stack(shares).amax(0)
        unknown = largest == 0
        for share, weight in zip(shares, weights, strict=True):
            share.div_(largest).masked_fill_(unknown, weight)
        total = weighted_sum([share.clone() for share in shares], [1.0] * len(shares))
        moved = [delta.mul_(share) for delta, share in zip(deltas, shares, strict=True)]
        return weighted_sum(moved, [1.0] * len(moved)).div_(total)

    def _importance(self, slot: int, place: Place, like: Tensor) -> Tensor:
        """One expert's Fisher values of a chunk."""
        information = self._information
        if information.shape(slot, place.name) is None:
            return torch.zeros_like(like)
        values = information.read_flat(slot, place.name, place.start, place.stop)
        values = values.to(device=like.device, dtype=like.dtype, copy=True)
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise NonFiniteError(
                f"{information.sources[slot].label} holds values of {place.name} that are no Fisher information: NaN, "
                "infinite or negative. Collect it again."
            )
        if self.normalise:
            values.div_(self._norms[slot])
        return values.clamp_(min=self.floor)


def _norm(information: Information, slot: int) -> float:
    source = information.sources[slot]
    total = sum(
        float(source.read_flat(name, start, stop).double().square().sum())  # squares underflow in fp32
        for name, info in source.infos.items()
        for start, stop in chunk_ranges(info)
    )
    if not 0 < total < math.inf:
        raise NonFiniteError(
            f"{source.label} cannot be normalised: its norm is {math.sqrt(total) if total >= 0 else total}."
        )
    return math.sqrt(total)
