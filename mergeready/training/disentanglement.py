from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike, open_experts
from mergeready.merging.evaluation import Score
from mergeready.merging.in_place import MergedInPlace
from mergeready.metrics.labels import distinct_labels
from mergeready.training.batches import (
    Batches,
    Forward,
    forward_logits,
    on_device_of,
    one_each,
    positions,
    require_repeatable,
)
from mergeready.training.bootstrap import estimate
from mergeready.training.records import Estimate
from mergeready.weights.open import WeightsLike


@dataclass(frozen=True, kw_only=True)
class Disentanglement:
    """Weight-disentanglement error of some experts.

    Attributes:
        error: ξ, the sum over tasks.
        tasks: Share of each expert's inputs on which the merge decides otherwise than the expert alone, by its label; a
            label that occurs again is numbered.
    """

    error: float
    tasks: dict[str, Estimate]


def disentanglement_error(
    model: nn.Module,
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    inputs: Sequence[Batches],
    *,
    scales: Sequence[float] | None = None,
    forward: Forward | Sequence[Forward] | None = None,
) -> Disentanglement:
    """How much experts change each other's decisions when their task vectors are added: ξ(α₁ … α_T).

    ``ξ = Σᵢ E_{x ~ task i} 1[f(x; θ₀ + αᵢ τᵢ) ≠ f(x; θ₀ + Σⱼ αⱼ τⱼ)]``, where f is the decided class; of sequences the
    mean over positions that are not padding. 0 where weights are disentangled: each task vector acts on its own task's
    inputs only. Ortiz-Jimenez et al., "Task Arithmetic in the Tangent Space" (arXiv 2305.12827), equation 3. It needs
    inputs, but no labels.

    *Evidence*: its authors show it as maps over (α₁, α₂), where it is lower for linearised fine-tuning, which merges
    better; no published correlation. *Cost*: two forward passes over each task's inputs and two merges a task.

    Args:
        model: The base, or a model fine-tuned from it; its weights are put back bit for bit.
        base: The base.
        experts: The experts, at least two.
        inputs: Batches of each expert's task, the same in the same order each time, as they are gone through twice.
        scales: α of each; 1 by default.
        forward: Gives logits, one for all or one a task, such as with a task's own head; by default
            ``model(**batch).logits``, or ``model(batch[0])`` for tuples.

    Raises:
        OptionError: If numbers of experts, inputs and scales differ, or inputs are none or can be read once only.
        MergeReadyError: If experts do not fit.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
        >>> _ = model.load_state_dict(base)
        >>> experts = [{"weight": torch.diag(torch.tensor(d))} for d in ([2.0, 1.0], [1.0, 2.0])]
        >>> inputs = [[torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]]
        >>> disentanglement_error(model, base, experts, inputs).error
        0.0
    """
    factors = [1.0] * len(experts) if scales is None else list(scales)
    if len(experts) < 2 or not len(experts) == len(inputs) == len(factors):
        raise OptionError(
            f"ξ needs at least two experts, with inputs and a scale each, not {len(experts)} experts, {len(inputs)} "
            f"inputs and {len(factors)} scales."
        )
    for batches in inputs:
        require_repeatable(batches)
    opened = Base.open(base)
    vectors = open_experts(experts, opened, strict=False)
    forwards = one_each(forward, forward_logits, len(inputs))
    differing: dict[str, Estimate] = {}
    total = 0.0
    labels = distinct_labels([expert.label for expert in vectors])
    for place in range(len(vectors)):
        alone = [float(i == place) * factor for i, factor in enumerate(factors)]
        own = _decisions(model, opened, vectors, alone, inputs[place], forwards[place])
        merged = _decisions(model, opened, vectors, factors, inputs[place], forwards[place])
        different = (own != merged).double().numpy()
        total += float(different.mean())
        differing[labels[place]] = estimate(Score(float(different.mean()), different))
    return Disentanglement(error=total, tasks=differing)


@torch.no_grad()
def _decisions(
    model: nn.Module,
    base: Base,
    experts: Sequence[Any],
    weights: Sequence[float],
    inputs: Batches,
    forward: Callable[[nn.Module, Any], Tensor],
) -> Tensor:
    settings: dict[str, Any] = {"weights": list(weights), "include_model": False}
    with MergedInPlace(model, base, experts, "task_arithmetic", **settings):
        model.eval()
        found = [
            positions(forward(model, batch), batch).argmax(-1).cpu() for batch in on_device_of(model, inputs)
        ]
    return torch.cat(found)
