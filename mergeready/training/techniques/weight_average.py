from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from mergeready.errors import OptionError
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.techniques.trained import Factored, Whole
from mergeready.weights.module import module_parameters
from mergeready.weights.shards import held, local, placed_like, whole

_HIGH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@register
@dataclass(frozen=True, kw_only=True)
class WeightAverage(Technique):
    """The expert is an average along its run, which probes, picks and the end of training see; training does not.

    ``ema``: ``θ̄ ← d θ̄ + (1−d) θ``. ``mean``: the mean of all snapshots (SWA, arXiv 1803.05407). ``last``: the
    mean of the newest ``count`` snapshots (LAWA, arXiv 2209.14981). ``mix`` then takes ``(1−a) θ₀ + a θ̄``
    (WiSE-FT, arXiv 2109.01903); for LoRA, whose second factor it scales, that holds for the effective weights
    too. Averages are those of ``torch.optim.swa_utils``, in fp32 for 16-bit parameters, over trained
    parameters; buffers are not averaged, so recalibrate batch norms. The framework's own evaluations and
    checkpoints see the weights in training.

    Cost: a copy of the trained weights (``count`` of them for ``last``) and one pass over them at each snapshot; of a
    sharded model each rank averages its shards, and gathers whole averages on the CPU for each checkpoint.

    Warning:
        That merged experts gain from it has not been published. Gains of averages shrink where the learning rate
        decays. Of a LoRA adapter the factors are averaged, which is not quite the average of their products.

    Attributes:
        kind: ``ema``, ``mean``, ``last``, or ``none`` to only mix.
        decay: d, in [0, 1).
        count: Snapshots that ``last`` keeps, at least 1.
        every: Steps between snapshots.
        first: The first step that is averaged.
        mix: a, in (0, 1]; 1 for the average itself.

    Example:
        >>> WeightAverage(kind="none", mix=1.0).is_off
        True
    """

    name: ClassVar[str] = "weight_average"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.EVALUATED, Touch.END})

    kind: Literal["ema", "mean", "last", "none"] = "ema"
    decay: float = 0.99
    count: int = 5
    every: int = 1
    first: int = 1
    mix: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in ("ema", "mean", "last", "none"):
            problems.append(f"`kind` must be 'ema', 'mean', 'last' or 'none', not {self.kind!r}")
        if not 0 <= self.decay < 1:
            problems.append(f"`decay` must be in [0, 1), not {self.decay}")
        if not 0 < self.mix <= 1:
            problems.append(f"`mix` must be in (0, 1], not {self.mix}")
        problems += [
            f"`{name}` must be at least 1, not {value}"
            for name, value in (("count", self.count), ("every", self.every), ("first", self.first))
            if value < 1
        ]
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @property
    def is_off(self) -> bool:
        return self.kind == "none" and self.mix == 1

    def begin(self, run: TechniqueRun) -> Running:
        return _Average(self, run)


class _Average(Running):
    def __init__(self, settings: WeightAverage, run: TechniqueRun) -> None:
        self._settings = settings
        self._snapshots: list[dict[str, Tensor]] = []  # one average, or the newest ones
        self._taken = 0
        self._mixed: dict[int, Whole | None] = {}
        if settings.mix < 1:
            for weight in run.weights.values():
                if isinstance(weight, Whole):
                    self._mixed[id(weight.parameters[0])] = weight
                elif isinstance(weight, Factored):
                    self._mixed[id(weight.factors[1])] = None
        self._all = module_parameters(run.live.model)
        self._parameters = {n: p for n, p in self._all.items() if p.requires_grad or id(p) in self._mixed}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        settings = self._settings
        if settings.kind == "none" or step < settings.first or (step - settings.first) % settings.every:
            return
        self._taken += 1
        if settings.kind == "last" or not self._snapshots:
            self._snapshots.append({name: _copy(p) for name, p in self._parameters.items()})
            self._snapshots = self._snapshots[-settings.count :]
            return
        swa: Any = swa_utils  # its functions have no annotations
        is_ema = settings.kind == "ema"
        average = swa.get_ema_multi_avg_fn(settings.decay) if is_ema else swa.get_swa_multi_avg_fn()
        [own] = self._snapshots
        current = [local(p).to(own[name].dtype) for name, p in self._parameters.items()]
        average(list(own.values()), current, torch.tensor(self._taken - 1))

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in self._parameters.items():
            value = self._value(name, parameter)
            if value is not None:
                yield local(parameter), value

    def _value(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        value: Tensor | None = None
        if self._snapshots:
            parts = [snapshot[name] for snapshot in self._snapshots]
            # From the first one, so that the mean of equal values is that value.
            value = parts[0] if len(parts) == 1 else parts[0] + (torch.stack(parts) - parts[0]).mean(0)
        if id(parameter) in self._mixed:
            value = local(parameter).float() if value is None else value
            weight, mix = self._mixed[id(parameter)], self._settings.mix
            value = value * mix if weight is None else torch.lerp(weight.base.float(), value.float(), mix)
        return value

    @torch.no_grad()
    def finish(self) -> None:
        # All values before the first write: a snapshot is no live tensor, but a mixed value may read one.
        for target, value in list(self.shown()):
            target.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "snapshots": len(self._snapshots)}

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}/{name}": whole(placed_like(self._parameters[name], value)).cpu()
            for index, snapshot in enumerate(self._snapshots)
            for name, value in snapshot.items()
        }

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._taken = int(state["taken"])
        averaged = {key.removeprefix("0/") for key in tensors if key.startswith("0/")}
        # What trains no more stays in the average; what only trains since then has been what it is.
        self._parameters |= {name: self._all[name] for name in averaged}

        def snapshot(index: int, name: str, parameter: nn.Parameter) -> Tensor:
            if averaged and name not in averaged:
                return _copy(parameter)
            return held(parameter).of(tensors[f"{index}/{name}"]).to(parameter.device, copy=True)

        self._snapshots = [
            {name: snapshot(index, name, p) for name, p in self._parameters.items()}
            for index in range(int(state["snapshots"]))
        ]


def _copy(parameter: Tensor) -> Tensor:
    value = local(parameter)
    return value.to(_HIGH.get(value.dtype, value.dtype), copy=True)
