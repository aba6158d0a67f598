from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.experts.base import Base
from mergeready.experts.delta import dense
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import TaskVector, require_finite
from mergeready.metrics.groups import group_of, layer_of
from mergeready.metrics.norms import NormAccumulator
from mergeready.metrics.stream import Accumulator, Chunk, accumulate
from mergeready.metrics.top_mass import TopMassAccumulator
from mergeready.weights.open import WeightsLike
from mergeready.weights.source import WeightSource

_ITERATIONS = 30


@dataclass(frozen=True)
class Inspection:
    """What one expert changed.

    Attributes:
        norm: ‖τ‖.
        relative_norm: ‖τ‖ / ‖θ₀‖ over the parameters that may have changed.
        groups: ‖τ‖ by group of parameters.
        layers: ‖τ‖ by layer index.
        sparsity: Share of entries that did not change at all.
        top_mass: Share of ‖τ‖² in the top 1 % of entries; NaN where nothing changed.
        rank: Largest rank that the expert's form allows, over its matrices.
        stable_rank: Mean of ‖τ‖²_F / ‖τ‖²₂ over its matrices; NaN without one.
    """

    norm: float
    relative_norm: float
    groups: dict[str, float]
    layers: dict[int, float]
    sparsity: float
    top_mass: float
    rank: int
    stable_rank: float


class _Zeros(Accumulator):
    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, chunk: Chunk) -> None:
        values = chunk.deltas[0]
        self.sums += torch.tensor([values.numel() - int(torch.count_nonzero(values)), values.numel()])


def inspect(base: WeightsLike | Base, expert: ExpertLike, *, strict: bool = True) -> Inspection:
    """Measure what one expert changed.

    Args:
        base: A folder or hub id, a state dict, or a module.
        expert: A folder, hub id, adapter, state dict or module.
        strict: Refuse an expert whose parameter names differ from the base's; see ``open_expert``.

    Raises:
        MergeReadyError: If one of them cannot be read, or it is no expert of the base.

    Example:
        >>> found = inspect({"layer.weight": torch.zeros(2, 2)}, {"layer.weight": torch.eye(2)})
        >>> round(found.norm, 3), found.sparsity
        (1.414, 0.5)
    """
    opened = Base.open(base)
    return inspect_vector(open_expert(expert, opened, strict=strict).vector, opened.source)


@torch.no_grad()
def inspect_vector(vector: TaskVector, base: WeightSource) -> Inspection:
    """Measure one task vector.

    Raises:
        NonFiniteError: If it holds NaN or infinite values.
    """
    names = list(vector)
    norms, top, zeros = NormAccumulator(names, 1), TopMassAccumulator(), _Zeros()
    accumulate([vector], base, [norms, top, zeros], names)
    require_finite(vector.label, norms.squared(0))
    matrices = [
        name for name, info in vector.infos.items() if len(info.shape) > 1 and norms.squared(0)[name] > 0
    ]
    ranks = [stable_rank(dense(vector[name]).flatten(1)) for name in matrices]
    layers = norms.by(lambda name: None if layer_of(name) is None else str(layer_of(name)), 0)
    return Inspection(
        norm=norms.norm(0),
        relative_norm=norms.relative_norm(0),
        groups=norms.by(group_of, 0),
        layers={int(layer): value for layer, value in layers.items()},
        sparsity=float(zeros.sums[0] / zeros.sums[1]),
        top_mass=top.share(0.01),
        rank=max((vector[name].rank() for name in matrices), default=0),
        stable_rank=sum(ranks) / len(ranks) if ranks else math.nan,
    )


def stable_rank(matrix: Tensor) -> float:
    """‖M‖²_F / ‖M‖²₂, the spectral norm by power iteration: at least 1, at most the rank.

    >>> round(stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0]))), 3)
    2.25
    """
    generator = torch.Generator().manual_seed(0)
    matrix = matrix / matrix.abs().max()  # squares of small entries would be zero in fp32
    direction = torch.randn(matrix.shape[1], generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        direction = matrix.T @ (matrix @ direction)
        direction /= torch.linalg.vector_norm(direction)
    largest = torch.linalg.vector_norm(matrix @ direction)
    return float(torch.linalg.matrix_norm(matrix).square() / largest.square())
