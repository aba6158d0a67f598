"""What the last steps of a run added to its task vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergeready.errors import NotTrainedError
from mergeready.experts.arithmetic import Difference, Without
from mergeready.experts.frame import Frame
from mergeready.experts.svd import thin_svd
from mergeready.experts.task_vector import TaskVector, require_finite
from mergeready.metrics.gram import GramAccumulator
from mergeready.metrics.labels import distinct_labels
from mergeready.metrics.norms import NormAccumulator
from mergeready.metrics.sign_conflict import SignConflictAccumulator
from mergeready.metrics.spectrum import TOP, spectrum_of
from mergeready.metrics.stream import accumulate
from mergeready.weights.source import WeightSource


@dataclass(frozen=True)
class PartOfRun:
    """One part of a run's task vector: what the steps until the pick made, or those after it.

    Attributes:
        norm: ‖part‖.
        cosine: Cosine with each peer, by its label; a label that occurs again is numbered.
        sign_conflict: Share of conflicting signs with each peer; 0.5 by chance.
        stable_rank: Mean of ‖·‖²_F / ‖·‖²₂ over matrices.
        effective_rank: Mean effective rank over matrices.
        top_energy: Number of leading directions to their share of the energy, the mean over matrices.
    """

    norm: float
    cosine: dict[str, float]
    sign_conflict: dict[str, float]
    stable_rank: float
    effective_rank: float
    top_energy: dict[int, float]


@dataclass(frozen=True)
class LatePart:
    """τ_end − τ_pick beside τ_pick.

    Attributes:
        late: What the steps after the pick added.
        early: τ_pick.
        share: ‖τ_end − τ_pick‖ / ‖τ_end‖.
        cosine_with_early: Cosine of the two parts: positive where training goes on in the same direction.
    """

    late: PartOfRun
    early: PartOfRun
    share: float
    cosine_with_early: float


@torch.no_grad()
def late_part(end: TaskVector, pick: TaskVector, peers: Sequence[TaskVector], base: WeightSource) -> LatePart:
    """Measure what late steps added, alone and against peers.

    *Cost*: one streamed pass over the parameters of all experts, and two SVDs a matrix.

    Args:
        end: The task vector at the end of a run.
        pick: The same run's at an earlier step, such as the merge-best.
        peers: Other experts on the base.
        base: The base's weights.

    Raises:
        BaseMismatchError: If they are of different bases.
        NotTrainedError: If nothing changed between the two.
        NonFiniteError: If values are NaN or infinite.

    Example:
        >>> from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense
        >>> from mergeready.weights import StateDictSource
        >>> base = StateDictSource({"layer": torch.ones(2, 2)})
        >>> def at(*diagonal):
        ...     change = {"layer": Dense(torch.diag(torch.tensor(diagonal)))}
        ...     return DeltaTaskVector(change, base.infos, BaseIdentity.of(base), "law")
        >>> found = late_part(at(3.0, 4.0), at(3.0, 0.0), [at(0.0, 1.0)], base)
        >>> found.share, found.cosine_with_early, found.late.cosine, found.early.cosine
        (0.8, 0.0, {'law': 1.0}, {'law': 0.0})
    """
    for peer in peers:
        end.base.require_same(peer.base, peer.label)
    late = Difference(end, pick)
    parts = [late, pick, end, *peers]
    names = list(dict.fromkeys(name for part in parts for name in part))
    norms, gram = NormAccumulator(names, len(parts)), GramAccumulator(len(parts))
    signs = SignConflictAccumulator(len(parts))
    accumulate(parts, base, [norms, gram, signs], names)
    for index, part in enumerate(parts):
        require_finite(part.label, norms.squared(index))
    if not norms.norm(0):
        raise NotTrainedError(
            f"{end.label} equals {pick.label}: there is no late part. Pick an earlier step."
        )
    cosines, conflicts = gram.cosines(), signs.pairwise()
    labels = distinct_labels([peer.label for peer in peers])

    def describe(index: int) -> PartOfRun:
        stable, effective, top = _mean_spectrum(parts[index])
        return PartOfRun(
            norm=norms.norm(index),
            cosine=dict(zip(labels, cosines[index, 3:].tolist(), strict=True)),
            sign_conflict=dict(zip(labels, conflicts[index, 3:].tolist(), strict=True)),
            stable_rank=stable,
            effective_rank=effective,
            top_energy=top,
        )

    return LatePart(
        late=describe(0),
        early=describe(1),
        share=norms.norm(0) / norms.norm(2) if norms.norm(2) else math.inf,
        cosine_with_early=float(cosines[0, 1]),
    )


def without_late_part(end: TaskVector, pick: TaskVector) -> TaskVector:
    """An expert with the direction of its late part projected out, parameter by parameter; to be merged as usual.

    ``τ − (⟨τ, d⟩ / ⟨d, d⟩) d`` with ``d = τ_end − τ_pick``. Where late steps go on in the direction of early ones,
    some of τ_pick goes, too: compare with merging τ_pick itself.

    Raises:
        NonFiniteError: If values are NaN or infinite.
    """
    return Without(end, Difference(end, pick), label=f"{end.label} without its late part")


def _mean_spectrum(part: TaskVector) -> tuple[float, float, dict[int, float]]:
    """Stable rank, effective rank and energy of leading directions: means over the matrices that are changed."""
    found = []
    for name, info in part.infos.items():
        frame = Frame.of([part[name]], [1.0]) if len(info.shape) > 1 else None
        if frame is not None:
            found.append(spectrum_of(thin_svd(frame.changes[0])[1]))

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return (
        mean([s.stable_rank for s in found]),
        mean([s.effective_rank for s in found]),
        {count: mean([s.top_energy[count] for s in found]) for count in TOP},
    )
