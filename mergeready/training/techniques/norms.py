"""The norm of the task vector in training, and making it shorter or longer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mergeready.experts.sums import squared_norm
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.trained import Factored, Trained, Whole
from mergeready.weights.shards import copies


def task_norm(run: TechniqueRun) -> float:
    """‖τ‖ of what trains, in float64. A collective where the model is sharded."""
    total = torch.zeros((), dtype=torch.float64)
    sharded = run.live.is_sharded
    for weight in run.weights.values():
        square = squared_norm(weight.delta().reshape(-1))
        total += square / (copies(weight.place, run.ranks.size) if sharded else 1)
    if sharded:
        run.ranks.add([total])
    return math.sqrt(float(total))


@torch.no_grad()
def scale_change(weights: Iterable[Trained], factor: float) -> None:
    """``τ ← factor · τ``; of a LoRA adapter, by its second factor."""
    for weight in weights:
        if isinstance(weight, Whole):
            base: Tensor = weight.base.float()
            weight.target.copy_(base.add(weight.delta(), alpha=factor))
        elif isinstance(weight, Factored):
            weight.factors[1].mul_(factor)
