from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.weights.module import module_parameters
from mergeready.weights.shards import copies, local


@register
@dataclass(frozen=True, kw_only=True)
class SharpnessAware(Technique):
    """Take the gradient at the worst point nearby: merging moves an expert, and a flat minimum bears that (SAM, ASAM).

    ``θ + ε`` with ``ε = ρ g/‖g‖`` (Foret et al., arXiv 2010.01412, equation 2); adaptive: ``ε = ρ T²g/‖Tg‖`` with
    ``T = |θ| + η`` (Kwon et al., arXiv 2102.11600, equation 7; its element-wise form, for all parameters).
    ``g`` is the gradient of the whole step, averaged over ranks. Both passes see the same random numbers, and
    buffers are those of the second. SAFT-Merge (arXiv 2504.14662) uses it for merging; its radius and figures
    are not public.

    Cost: two passes forward and backward at every step it acts at, and a copy of the trained weights.

    Attributes:
        radius: ρ, at least 0; 0 switches it off.
        adaptive: Whether the neighbourhood scales with each weight. Its radius is then ten times larger and more.
        eta: η, of the adaptive form.
        every: Steps from one such step to the next; others are plain.

    Example:
        >>> SharpnessAware(radius=0.05).touches == {Touch.FORWARD}
        True
    """

    name: ClassVar[str] = "sharpness_aware"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.FORWARD})

    radius: float = 0.05
    adaptive: bool = False
    eta: float = 0.01
    every: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"`{name}` must be a number of at least 0, not {value}"
            for name, value in (("radius", self.radius), ("eta", self.eta))
            if not 0 <= value < math.inf
        ]
        if self.every < 1:
            problems.append(f"`every` must be at least 1, not {self.every}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @property
    def is_off(self) -> bool:
        return self.radius == 0

    def begin(self, run: TechniqueRun) -> Running:
        return _Ascent(self, run)


class _Ascent(Running):
    def __init__(self, settings: SharpnessAware, run: TechniqueRun) -> None:
        self._settings, self._run = settings, run

    def wants_gradient(self, step: int) -> bool:
        return step % self._settings.every == 0

    def moved(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.wants_gradient(step):
            return
        found = [
            (parameter, local(parameter), local(parameter.grad))
            for parameter in module_parameters(self._run.live.model).values()
            if parameter.grad is not None
        ]
        norm = self._norm([(parameter, self._ascent(own, grad)) for parameter, own, grad in found])
        if not 0 < norm < math.inf:  # nothing to climb, or gradients that a scaler made overflow
            return
        for _, own, grad in found:
            direction = self._ascent(own, grad)
            if self._settings.adaptive:
                direction = direction * (own.abs() + self._settings.eta)
            yield own, own + direction.to(own.dtype) * (self._settings.radius / norm)

    def _ascent(self, own: Tensor, grad: Tensor) -> Tensor:
        """g, or Tg."""
        return grad * (own.abs() + self._settings.eta) if self._settings.adaptive else grad

    def _norm(self, parts: list[tuple[nn.Parameter, Tensor]]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        sharded = self._run.live.is_sharded
        for parameter, part in parts:
            square = part.float().square().sum(dtype=torch.float64).cpu()
            total += square / (copies(parameter, self._run.ranks.size) if sharded else 1)
        if sharded:
            self._run.ranks.add([total])
        return math.sqrt(float(total))
