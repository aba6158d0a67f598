"""Interference beyond cosine: what experts do to each other's singular directions, over all matrices of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, OptionError, listing
from mergeready.experts.frame import Frame, all_finite
from mergeready.experts.svd import thin_svd, total
from mergeready.experts.task_vector import TaskVector
from mergeready.metrics.over_accumulation import times_over_of
from mergeready.metrics.right_overlap import RANK, chance_overlap, overlap_of
from mergeready.metrics.singular_interference import interference_of
from mergeready.metrics.spectrum import spectrum_of
from mergeready.metrics.subspace_alignment import KEPT, leading_of, share_inside


@dataclass(frozen=True)
class SubspaceComparison:
    """How experts of one base share singular directions: means over the matrices that they change.

    Attributes:
        labels: The experts.
        matrices: How many matrices at least two of them change.
        alignment: Subspace alignment ratio of each expert with the merge, in [0, 1].
        overlap: Overlap of the leading right singular subspaces by pair, a list of rows; NaN without a common matrix.
        overlap_by_chance: What two strangers would have.
        interference: Singular task interference of all leading directions, over the sum of their singular values.
        times_over: How many times over the merge does what the experts do; 1 without shared directions.
        stable_rank: ‖τ‖²_F / ‖τ‖²₂ of each expert.
        effective_rank: Effective rank of each expert.
    """

    labels: list[str]
    matrices: int
    alignment: list[float]
    overlap: list[list[float]]
    overlap_by_chance: float
    interference: float
    times_over: float
    stable_rank: list[float]
    effective_rank: list[float]


@torch.no_grad()
def compare_subspaces(
    vectors: Sequence[TaskVector],
    merged: TaskVector | None = None,
    *,
    rank: int = RANK,
    kept: float = KEPT,
) -> SubspaceComparison:
    """Compare task vectors by their singular directions, matrix by matrix.

    Kernels of convolutions count as matrices of (out, in · height · width). Matrices that fewer than two experts
    change are left out. Low-rank experts are compared as small cores in a common basis, exactly.

    *Cost*: one float64 SVD a matrix for each expert and one for the merge; memory is one matrix of all of them. On one
    CPU core about 2 s an expert for the 36 matrices of a six-layer encoder of width 384.

    Args:
        vectors: The experts, at least two.
        merged: The merge that alignment and over-accumulation are measured against; by default the experts' sum, as
            task arithmetic makes it.
        rank: Leading directions of each expert, for overlap and interference.
        kept: Share of the merge's norm that its leading directions hold, for the alignment.

    Raises:
        OptionError: If there are fewer than two experts, or a number is out of range.
        BaseMismatchError: If they, or the merge, are of different bases.
        NonFiniteError: If they hold NaN or infinite values; all such parameters are listed.

    Example:
        >>> from mergeready.experts import open_expert
        >>> base = {"layer": torch.zeros(2, 2)}
        >>> experts = [{"layer": torch.diag(torch.tensor(d))} for d in ([1.0, 0.0], [0.0, 2.0])]
        >>> found = compare_subspaces([open_expert(expert, base).vector for expert in experts])
        >>> found.overlap[0][1], found.interference, found.times_over
        (0.0, 0.0, 1.0)
    """
    if len(vectors) < 2:
        raise OptionError(f"comparing needs at least two experts, not {len(vectors)}.")
    if rank < 1:
        raise OptionError(f"`rank` must be at least 1, not {rank}.")
    if not 0 < kept <= 1:
        raise OptionError(f"`kept` must be in (0, 1], not {kept}.")
    for other in [*vectors[1:], *([] if merged is None else [merged])]:
        vectors[0].base.require_same(other.base, other.label)
    sums, broken = _Sums(len(vectors)), []
    for name in dict.fromkeys(n for v in vectors for n, info in v.infos.items() if len(info.shape) > 1):
        deltas = [vector.get(name) for vector in vectors]
        goal = None if merged is None else merged.get(name)
        if not all_finite([*deltas, goal]):
            broken.append(name)
            continue
        frame = Frame.of([*deltas, goal], [1.0] * (len(vectors) + 1))
        if frame is None or sum(slot < len(vectors) for slot in frame.slots) < 2:
            continue
        _add_matrix(sums, frame, merged is not None, rank, kept)
    if broken:
        raise NonFiniteError(
            f"{listing(v.label for v in vectors)} hold NaN or infinite values in {listing(broken)}. Training diverged "
            "or a file is damaged; use an earlier checkpoint."
        )
    return sums.result([vector.label for vector in vectors])


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass
class _Sums:
    count: int
    matrices: int = 0
    alignment: list[_Mean] = field(init=False)
    stable: list[_Mean] = field(init=False)
    effective: list[_Mean] = field(init=False)
    overlap: dict[tuple[int, int], _Mean] = field(init=False)
    chance: _Mean = field(default_factory=_Mean)
    interference: _Mean = field(default_factory=_Mean)
    times_over: _Mean = field(default_factory=_Mean)

    def __post_init__(self) -> None:
        self.alignment, self.stable, self.effective = ([_Mean() for _ in range(self.count)] for _ in range(3))
        self.overlap = {(a, b): _Mean() for a in range(self.count) for b in range(a)}

    def result(self, labels: list[str]) -> SubspaceComparison:
        def pair(a: int, b: int) -> float:
            return 1.0 if a == b else self.overlap[max(a, b), min(a, b)].value

        return SubspaceComparison(
            labels=labels,
            matrices=self.matrices,
            alignment=[mean.value for mean in self.alignment],
            overlap=[[pair(a, b) for b in range(self.count)] for a in range(self.count)],
            overlap_by_chance=self.chance.value,
            interference=self.interference.value,
            times_over=self.times_over.value,
            stable_rank=[mean.value for mean in self.stable],
            effective_rank=[mean.value for mean in self.effective],
        )


def _add_matrix(sums: _Sums, frame: Frame, merged_given: bool, rank: int, kept: float) -> None:
    """Add what one parameter's changes say; the merge's own is the last of them where one was given."""
    changes = dict(zip(frame.slots, frame.changes, strict=True))
    goal = changes.pop(sums.count, None)
    triples = {slot: thin_svd(change) for slot, change in changes.items()}
    if sum(len(values) > 0 for _, values, _ in triples.values()) < 2:  # factors may cancel to nothing
        return
    if goal is None:  # a merge may leave a parameter as it is, though experts change it
        first = next(iter(changes.values()))
        goal = (
            torch.zeros_like(first) if merged_given else total(change.clone() for change in changes.values())
        )
    sums.matrices += 1
    _add_experts(sums, triples, rank)
    sums.chance.add(chance_overlap(frame.shape[1], rank))
    strongest = [(U[:, :rank], values[:rank], V[:rank]) for U, values, V in triples.values()]
    sums.interference.add(interference_of(strongest) / sum(float(values.sum()) for _, values, _ in strongest))
    merge = thin_svd(goal)
    basis = leading_of(merge[0], merge[1], kept)
    for slot, change in changes.items():
        sums.alignment[slot].add(share_inside(change, basis))
    sums.times_over.add(times_over_of(merge, list(changes.values())))


def _add_experts(sums: _Sums, triples: dict[int, tuple[Tensor, Tensor, Tensor]], rank: int) -> None:
    for slot, (_, values, right) in triples.items():
        found = spectrum_of(values)
        sums.stable[slot].add(found.stable_rank)
        sums.effective[slot].add(found.effective_rank)
        for other, (_, _, others) in triples.items():
            if other < slot:
                sums.overlap[slot, other].add(overlap_of(right[:rank], others[:rank]))
