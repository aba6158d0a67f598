from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.svd import ZERO, thin_svd


def projections(merged: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How many times over a merge does what each expert does, direction by direction.

    For ``M = U Σ Vᵀ`` and each direction r: ``aᵢ = uᵣᵀ τᵢ`` is what expert i writes there, and ``sᵢʳ = ⟨uᵣᵀ M, aᵢ⟩ /
    ‖aᵢ‖²`` how often the merge contains it; above 1 it is over-accumulated. Li et al., "When Shared Knowledge Hurts"
    (arXiv 2602.05536), which the merge method ``svc`` corrects for.

    *Cost*: one SVD of the merged matrix and one product an expert.

    Args:
        merged: The merged change of a parameter, (rows, columns); rows are outputs.
        deltas: Each expert's change of it.

    Returns:
        σ of the merge, float64 (directions,), and s, (experts, directions): 0 where an expert does nothing
        (``‖aᵢ‖ ≤ 1e-6 ‖τᵢ‖``).

    Raises:
        OptionError: If there are no experts.

    Example:
        >>> shared = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> values, times = projections(3 * shared, [shared, shared, shared])
        >>> times.flatten().tolist()
        [3.0, 3.0, 3.0]
    """
    if not deltas:
        raise OptionError("over-accumulation needs at least one expert.")
    left, values, right = thin_svd(merged.double())
    rows = []
    for delta in deltas:
        answers = left.T @ delta.to(left)
        energy = answers.square().sum(1)
        there = energy > (ZERO * delta.double().norm()) ** 2
        rows.append(torch.where(there, values * (answers * right).sum(1) / energy, 0.0))
    return values, torch.stack(rows)


def times_over(merged: Tensor, deltas: Sequence[Tensor]) -> float:
    """How many times over a merge does what its experts do, as one number.

    ``Σᵣ σᵣ² cᵣ / Σᵣ σᵣ²`` with ``cᵣ = Σᵢ ⟨uᵣᵀ M, aᵢ⟩ / Σᵢ ‖aᵢ‖²``: the mean of :func:`projections` over experts,
    weighted by how much each does in a direction, and over directions by energy. 1 for a sum of experts that share
    nothing, T for the sum of T equal ones, 1 for their average. The weights are ours; they keep experts that do next
    to nothing in a direction from deciding.

    *Evidence*: an over-accumulation score of another project, made from the same projections, had a Spearman
    correlation of 0.25 with merged quality over 30 merges. Correcting it (``svc``) helps, as its authors report.
    *Cost*: as :func:`projections`.

    Returns:
        A number; NaN where the merge changes nothing, or nothing that the experts do.

    Raises:
        OptionError: If there are no experts.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> times_over(a + b, [a, b]), times_over(2 * a, [a, a]), times_over(a, [a, a])
        (1.0, 2.0, 1.0)
    """
    if not deltas:
        raise OptionError("over-accumulation needs at least one expert.")
    return times_over_of(thin_svd(merged.double()), deltas)


def times_over_of(triples: tuple[Tensor, Tensor, Tensor], deltas: Sequence[Tensor]) -> float:
    """The same from the merge's singular triples: U, σ, Vᵀ."""
    left, values, right = triples
    inner, energy = torch.zeros_like(values), torch.zeros_like(values)
    for delta in deltas:
        answers = left.T @ delta.to(left)
        inner += values * (answers * right).sum(1)
        energy += answers.square().sum(1)
    there = energy > (ZERO * values) ** 2
    weights = torch.where(there, values.square(), 0.0)
    if not float(weights.sum()):
        return math.nan
    counted = torch.where(there, inner / energy, 0.0)
    return float((weights * counted).sum() / weights.sum())
