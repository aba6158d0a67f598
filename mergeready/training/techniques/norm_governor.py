from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mergeready.errors import OptionError
from mergeready.training.batches import Batches, Forward, require_repeatable
from mergeready.training.confidence import confidence
from mergeready.training.techniques.norms import scale_change, task_norm
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch


@register
@dataclass(frozen=True, kw_only=True)
class NormGovernor(Technique):
    """Keep ‖τ‖ where the peers' are: after an update that goes beyond, ``τ ← τ · limit/‖τ‖``.

    The limit is ``max_norm``, or ``(1 + band)`` times the median of the peers' norms. With ``grow``, a task vector
    that ends shorter than ``(1 − band)`` times their median is stretched to it at the end; what that does to
    the expert is not trained any more, so evaluate it again. Why: DisTaC (arXiv 2508.01148) shows that
    norms which differ 5 to 7 times cost task arithmetic 7 points and WUDI 36 (eight vision tasks, ViT-B/32),
    and mends experts by distillation at a common norm (``distilled_finish``); this holds the norm while training can
    still adapt. It also finds low confidence harmful: train without label smoothing, mixup and focal loss, and
    calibrate after merging; with ``inputs``, the loggers get the confidence and entropy on them. For LoRA, the second
    factor is scaled.

    Cost: one pass over the trained weights at each check, and over ``inputs`` at each measurement. Evidence for
    projecting during training: none published.

    Attributes:
        max_norm: Limit on ‖τ‖; None for the peers'.
        band: Share above and below the peers' median that is allowed, at least 0.
        grow: Whether to stretch a task vector that ends too short.
        every: Steps between checks; the last one is checked in any case.
        inputs: Batches of unlabelled inputs on which to measure confidence; None for none.
        forward: Gives the logits of a batch of them.

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
    inputs: Batches | None = None
    forward: Forward | None = None

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
        if self.inputs is not None:
            require_repeatable(self.inputs)

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
        self._model = run.live.model

    def after_update(self, step: int) -> None:
        if step % self._settings.every == 0 or step == self._run.total_steps:
            self._hold(0.0)

    def finish(self) -> None:
        self._hold(self._least)

    def scalars(self) -> Mapping[str, float]:
        figures = {"norm": self._norm, "limit": self._limit}
        if self._settings.inputs is not None:
            found = confidence(self._model, self._settings.inputs, forward=self._settings.forward)
            figures |= {"confidence": found.mean, "entropy": found.entropy}
        return figures

    def _hold(self, least: float) -> None:
        self._norm = task_norm(self._run)
        wanted = min(max(self._norm, least), self._limit)
        if self._norm > 0 and wanted != self._norm:
            scale_change(self._weights, wanted / self._norm)
