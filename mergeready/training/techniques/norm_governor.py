from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.sums import squared_norm
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.techniques.trained import Factored, Trained, Whole
from mergeready.weights.shards import copies


@register
@dataclass(frozen=True, kw_only=True)
class NormGovernor(Technique):
    """Keep ‖τ‖ where the peers' are: after an update that goes beyond, ``τ ← τ · limit/‖τ‖``.

    The limit is ``max_norm``, or ``(1 + band)`` times the median of the peers' norms. With ``grow``, a task vector
    that ends shorter than ``(1 − band)`` times their median is stretched to it at the end; what that does to
    the expert is not trained any more, so look at the last probe. Why: DisTaC (arXiv 2508.01148) shows that
    norms which differ 5 to 7 times cost task arithmetic 7 points and WUDI 36 (eight vision tasks, ViT-B/32),
    and mends experts by distillation at a common norm; this holds the norm while training can still adapt. It
    also finds low confidence harmful: train without label smoothing, mixup and focal loss, and calibrate after
    merging. For LoRA, the second factor is scaled.

    Cost: one pass over the trained weights at each check. Evidence for projecting during training: none published.

    Attributes:
        max_norm: Limit on ‖τ‖; None for the peers'.
        band: Share above and below the peers' median that is allowed, at least 0.
        grow: Whether to stretch a task vector that ends too short.
        every: Steps between checks; the last one is checked in any case.

    Example:
        >>> NormGovernor(max_norm=3.0).band
        0.25
    """

    name: ClassVar[str] = "norm_governor"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.WEIGHTS})

    max_norm: float | None = None
    band: float = 0.25
    grow: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.max_norm is not None and not 0 < self.max_norm < math.inf:
            problems.append(f"`max_norm` must be positive, or None, not {self.max_norm}")
        if not 0 <= self.band < math.inf:
            problems.append(f"`band` must be a number of at least 0, not {self.band}")
        if self.every < 1:
            problems.append(f"`every` must be at least 1, not {self.every}")
        if self.grow and (self.max_norm is not None or not self.band < 1):
            problems.append("`grow` needs the peers' norms and a band below 1, so leave `max_norm` out")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    def begin(self, run: TechniqueRun) -> Running:
        norms = [peer.norm for peer in run.peers] + [peer.fingerprint.norm for peer in run.sketched]
        if self.max_norm is None and not norms:
            raise OptionError("norm_governor needs `max_norm`, or peers whose norms to keep to.")
        middle = statistics.median(norms) if norms else 0.0
        limit = self.max_norm if self.max_norm is not None else middle * (1 + self.band)
        return _Governor(self, run, limit, middle * (1 - self.band) if self.grow else 0.0)


class _Governor(Running):
    def __init__(self, settings: NormGovernor, run: TechniqueRun, limit: float, least: float) -> None:
        self._settings, self._run, self._limit, self._least = settings, run, limit, least
        self._weights, self._norm = list(run.weights.values()), 0.0

    def after_update(self, step: int) -> None:
        if step % self._settings.every == 0 or step == self._run.total_steps:
            self._hold(0.0)

    def finish(self) -> None:
        self._hold(self._least)

    def scalars(self) -> Mapping[str, float]:
        return {"norm": self._norm, "limit": self._limit}

    def _hold(self, least: float) -> None:
        self._norm = self._measure()
        wanted = min(max(self._norm, least), self._limit)
        if self._norm > 0 and wanted != self._norm:
            for weight in self._weights:
                _scale(weight, wanted / self._norm)

    def _measure(self) -> float:
        total = torch.zeros((), dtype=torch.float64)
        sharded = self._run.live.is_sharded
        for weight in self._weights:
            square = squared_norm(weight.delta().reshape(-1))
            total += square / (copies(weight.place, self._run.ranks.size) if sharded else 1)
        if sharded:
            self._run.ranks.add([total])
        return math.sqrt(float(total))


@torch.no_grad()
def _scale(weight: Trained, factor: float) -> None:
    """``τ ← factor · τ``."""
    if isinstance(weight, Whole):
        base: Tensor = weight.base.float()
        weight.target.copy_(base.add(weight.delta(), alpha=factor))
    elif isinstance(weight, Factored):
        weight.factors[1].mul_(factor)
