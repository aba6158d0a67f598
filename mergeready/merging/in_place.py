from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.live import LiveExpert
from mergeready.experts.open import ExpertLike, open_experts
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.parameter import (
    add_delta,
    merged_span,
    raise_if_broken,
    require_finite_chunk,
)
from mergeready.merging.registry import MethodLike
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import expert_statistics, warn_if_stale
from mergeready.weights.guard import untouched
from mergeready.weights.module import ModuleSource
from mergeready.weights.open import WeightsLike
from mergeready.weights.shards import local, reshard


class MergedInPlace:
    """Inside the ``with`` block, a live model holds merged weights; afterwards, its own again, bit for bit.

    The merge is computed once, on entry; ``set_scale`` then changes the scale at the cost of one addition. Weights,
    buffers, random state, training flags and ``requires_grad`` are put back also after an exception. Beside the
    model this holds its own weights and the merged deltas, on the CPU.

    Of a model that is sharded over ranks, each rank merges what it holds; one parameter at a time is gathered, for
    methods that need more of it. All ranks enter together then. Leaving takes no collective, so a rank that fails
    inside leaves none of the others waiting.

    Args:
        model: The model in training, or a ``LiveExpert`` that was made from it.
        base: The base; see ``LiveExpert``. Ignored if ``model`` is a ``LiveExpert``.
        experts: The other experts.
        method: A merge method's name, or a method with its parameters.
        scale: Factor on the merged delta.
        weights: One factor an expert, the model's own first; 1 each by default.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        include_model: Whether the model's own task vector takes part. Without it and without experts, the block
            sees the base.
        **parameters: The method's parameters.

    Raises:
        MergeReadyError: As ``open_expert`` does; ``NonFiniteError`` on entry if merged values are not finite.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> base = {name: 0.9 * p for name, p in model.state_dict().items()}
        >>> with MergedInPlace(model, base, [], scale=0.0):
        ...     bool(torch.equal(model.weight, base["weight"]))
        True
        >>> bool(torch.equal(model.weight, before))
        True
    """

    def __init__(
        self,
        model: nn.Module | LiveExpert,
        base: WeightsLike | Base | None,
        experts: Sequence[ExpertLike],
        method: MethodLike = "task_arithmetic",
        *,
        scale: float = 1.0,
        weights: Sequence[float] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        include_model: bool = True,
        **parameters: Any,
    ) -> None:
        self.live = model if isinstance(model, LiveExpert) else LiveExpert(model, base)
        with self.live.base_readable():
            others = open_experts(experts, self.live.base, strict=False)
        opened = [expert.vector for expert in others]
        if others:
            own = [("this run", ModuleSource(self.live.model))] if include_model else []
            warn_if_stale(self.live.base.source, [*own, *expert_statistics(others)], "the model's own")
        self.vectors: list[TaskVector] = [self.live.vector, *opened] if include_model else opened
        self._settings = MergeSettings.make(
            method, len(self.vectors), scale=scale, weights=weights, overrides=overrides, **parameters
        )
        self._settings.check(self.live.base.source, self.vectors)
        self._deltas: dict[str, Tensor] = {}
        self._stack = ExitStack()
        names = [*self.live.vector, *(name for vector in opened for name in vector)]
        self._names = [name for name in dict.fromkeys(names) if name in self.live.targets]

    def __enter__(self) -> MergedInPlace:
        self._deltas = self._merge()
        targets = {name: self.live.targets[name] for name in self._names}
        with ExitStack() as stack:
            self._kept = stack.enter_context(untouched(self.live.model, targets))
            stack.enter_context(self.live.adapter_off())
            self._write()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._deltas, self._kept = {}, {}
        self._stack.__exit__(kind, error, traceback)

    def set_scale(self, scale: float) -> None:
        """Write the merged weights for another scale.

        Raises:
            OptionError: If the scale is not finite, or the block was left.
        """
        if not self._deltas and self._names:
            raise OptionError("the scale can only be set inside the `with` block.")
        self._settings = self._settings.with_scale(scale)
        self._write()

    def _merge(self) -> dict[str, Tensor]:
        """The merged deltas of what this rank holds, on the CPU."""
        deltas: dict[str, Tensor] = {}
        broken: list[str] = []
        failure: Exception | None = None
        with self.live.readable():
            for name in self._names:
                # Every rank takes part in gathering all parameters, also after a failure, or the others would wait.
                with self.live.gathered(name):
                    if failure is None:
                        try:
                            deltas[name] = self._merged(name)
                            require_finite_chunk(deltas[name], name, broken)
                        except Exception as error:  # noqa: BLE001 - raised below, on every rank
                            failure = error
            with self.live.ranks.together():
                if failure is not None:
                    raise failure
            self._raise_if_broken(broken)
        return deltas

    def _raise_if_broken(self, broken: Sequence[str]) -> None:
        """Raise the same on every rank, though the broken values may be another's."""
        found = {name for names in self.live.ranks.each(list(broken)) for name in names}
        broken = [name for name in self._names if name in found]
        looked_at = broken[:3] if self.live.is_sharded else broken
        with ExitStack() as stack:
            for name in looked_at:
                stack.enter_context(self.live.gathered(name))
            raise_if_broken(broken, self.vectors, looked_at)

    def _merged(self, name: str) -> Tensor:
        setting, info = self._settings.at(name), self.live.base.source.infos[name]
        block = self.live.blocks[name]
        # A block that is whole or no range of elements is computed in the same pieces as by every other engine.
        span = block.span if block.sizes != block.shape else None
        merged = merged_span(setting.method, name, info, self.vectors, setting.weights, span)
        if merged is None:
            return torch.zeros(block.sizes)
        return merged.reshape(block.sizes).cpu() if span else block.of(merged.reshape(block.shape)).cpu()

    @torch.no_grad()
    def _write(self) -> None:
        reshard(self.live.model)
        for name, delta in self._deltas.items():
            target = local(self.live.targets[name])
            # With a live base the target *is* the base until it is overwritten; what was kept still is.
            base = (
                self._kept[name]
                if self.live.base_is_live
                else self.live.blocks[name].read(self.live.base.source, name)
            )
            target.copy_(add_delta(base, delta, self._settings.at(name).scale, target.dtype))
