from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import TaskVector
from mergeready.metrics.gram import GramAccumulator
from mergeready.metrics.norms import NormAccumulator, norm_ratio
from mergeready.metrics.sign_conflict import SignConflictAccumulator, chance_conflict
from mergeready.metrics.stream import accumulate
from mergeready.weights.open import WeightsLike
from mergeready.weights.source import WeightSource


class Pairs(Protocol):
    """What every comparison has, exact or estimated: experts, their norms, and a number a pair."""

    @property
    def labels(self) -> list[str]:
        """The experts."""

    @property
    def norms(self) -> list[float]:
        """‖τ‖ of each."""

    @property
    def cosine(self) -> list[list[float]]:
        """Cosine by pair, a list of rows."""

    @property
    def sign_conflict(self) -> list[list[float]]:
        """Share of conflicting signs by pair, a list of rows."""


@dataclass(frozen=True)
class Comparison:
    """How experts of one base relate to each other.

    Attributes:
        labels: The experts.
        norms: ‖τ‖ of each.
        relative_norms: ‖τ‖ / ‖θ₀‖ of each, over parameters that any of them changed.
        cosine: Cosine by pair, a list of rows.
        sign_conflict: Share of conflicting signs by pair; 0.5 by chance.
        norm_ratio: Largest over smallest norm.
        conflict_of_all: Sign conflict of all together.
        conflict_normalised: The same over its chance level: 1 as among random signs.
        chance: The chance level for as many experts, where all of them change a coordinate.
    """

    labels: list[str]
    norms: list[float]
    relative_norms: list[float]
    cosine: list[list[float]]
    sign_conflict: list[list[float]]
    norm_ratio: float
    conflict_of_all: float
    conflict_normalised: float
    chance: float


def compare(base: WeightsLike | Base, experts: Sequence[ExpertLike], *, strict: bool = True) -> Comparison:
    """Compare experts of one base: how long their task vectors are, and how they interfere, pair by pair.

    Args:
        base: A folder or hub id, a state dict, or a module.
        experts: At least two, of any kind, mixed as you like: folders, hub ids, adapters, state dicts, modules.
        strict: Refuse experts whose parameter names differ from the base's; see ``open_expert``.

    Raises:
        OptionError: If there are fewer than two.
        MergeReadyError: If one of them cannot be read, or is no expert of the base.

    Example:
        >>> base = {"layer.weight": torch.zeros(2, 2)}
        >>> first, second = torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
        >>> found = compare(base, [{"layer.weight": first}, {"layer.weight": second}])
        >>> found.norms, round(found.cosine[0][1], 2)
        ([5.0, 5.0], -0.28)
    """
    opened = Base.open(base)
    vectors = [open_expert(expert, opened, strict=strict).vector for expert in experts]
    return compare_vectors(vectors, opened.source)


@torch.no_grad()
def compare_vectors(vectors: Sequence[TaskVector], base: WeightSource) -> Comparison:
    """Compare task vectors in one streamed pass over all parameters that any of them changes.

    Raises:
        OptionError: If there are fewer than two.
    """
    if len(vectors) < 2:
        raise OptionError(f"comparing needs at least two experts, not {len(vectors)}.")
    names = list(dict.fromkeys(name for vector in vectors for name in vector))
    norms = NormAccumulator(names, len(vectors))
    gram = GramAccumulator(len(vectors))
    signs = SignConflictAccumulator(len(vectors))
    accumulate(vectors, base, [norms, gram, signs], names)
    values = [norms.norm(index) for index in range(len(vectors))]
    return Comparison(
        labels=[vector.label for vector in vectors],
        norms=values,
        relative_norms=[norms.relative_norm(index) for index in range(len(vectors))],
        cosine=gram.cosines(torch.tensor(values, dtype=torch.float64)).tolist(),
        sign_conflict=signs.pairwise().tolist(),
        norm_ratio=norm_ratio(values),
        conflict_of_all=signs.of_all(),
        conflict_normalised=signs.normalised(),
        chance=chance_conflict(len(vectors)),
    )
