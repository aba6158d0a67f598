"""The learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from mergeready.study.settings import RateSettings


class Rate:
    """Sets an optimizer's learning rate before each step.

    Args:
        settings: How it goes.
        optimizer: The optimizer, at its peak rate.
        total: Steps of the whole run.
        greater_is_better: Direction of the validation metric, for ``plateau``.
    """

    def __init__(
        self, settings: RateSettings, optimizer: Optimizer, total: int, *, greater_is_better: bool
    ) -> None:
        self._settings, self._optimizer, self._total = settings, optimizer, total
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        # Torch's own scheduler decides on an optimizer of its own, whose rate is the factor on ours.
        self._shadow = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._shadow,
            mode="max" if greater_is_better else "min",
            factor=settings.factor,
            patience=settings.patience,
            threshold=0.0,
        )

    def before(self, step: int) -> None:
        """Set the rate of a step, counted from 1."""
        factor = rate_factor(self._settings, step, self._total) * float(self._shadow.param_groups[0]["lr"])
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def evaluated(self, value: float) -> None:
        """Tell the validation metric."""
        if self._settings.kind == "plateau":
            self._plateau.step(value)


def rate_factor(settings: RateSettings, step: int, total: int) -> float:
    """Share of the peak rate at a step from 1 to ``total``; reductions on plateaus come on top.

    >>> cosine = RateSettings(kind="cosine", warmup_steps=2)
    >>> [round(rate_factor(cosine, step, 10), 2) for step in (1, 2, 3, 6, 10)]
    [0.5, 1.0, 1.0, 0.69, 0.04]
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    done = (step - 1 - settings.warmup_steps) / max(total - settings.warmup_steps, 1)
    if settings.kind == "linear":
        return 1.0 - done
    if settings.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
