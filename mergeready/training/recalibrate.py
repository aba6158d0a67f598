from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergeready.errors import NonFiniteError, OptionError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.merging.statistics import expert_statistics, live_experts
from mergeready.training.batches import Batches, call, on_device_of
from mergeready.weights.guard import untouched
from mergeready.weights.module import plain_name, unwrap
from mergeready.weights.open import WeightsLike

logger = logging.getLogger("mergeready")


@dataclass(frozen=True)
class Recalibration:
    """What was recomputed.

    Attributes:
        layers: The layers that have new statistics.
        batches: Number of batches seen.
        kept: BatchNorm layers whose statistics stayed, since no expert was trained with live ones there.
    """

    layers: tuple[str, ...]
    batches: int
    kept: tuple[str, ...] = ()


def recalibrate(
    model: nn.Module,
    batches: Batches,
    *,
    base: WeightsLike | Base | None = None,
    experts: Sequence[ExpertLike] = (),
    force: bool = False,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Recalibration:
    """Recompute the BatchNorm statistics of a merged model on data, for experts that were trained with live ones.

    Merged weights see other activations than any expert's, so no expert's statistics fit them, nor their average.
    Experts that were trained with frozen BatchNorm are the opposite case: their weights were fitted to the base's
    statistics, and recomputing destroys them. Which case it is shows in the statistics themselves: ``base`` and
    ``experts`` are needed to look, and only layers that are live in some expert are recomputed.

    Mean and unbiased variance are over all examples of all batches together, pooled in float64 (``update_bn`` of
    torch averages the batches' variances, which leaves out how their means vary, and weighs a short last batch like a
    full one). Each batch is normalised by its own statistics on the way, as in training. Everything else is as in
    evaluation: dropout is off. Afterwards nothing but the statistics has changed; nothing has after an exception.

    Args:
        model: The merged model, changed in place.
        batches: What it will be used on: without labels, mixed over the tasks, in batches as large as in training.
        base: The base of the merge.
        experts: The experts of the merge.
        force: Recompute every layer, whatever the experts.
        forward: Runs the model on a batch; by default ``model(**batch)``, or ``model(batch[0])`` for tuples.

    Raises:
        UnsupportedError: If the model has no BatchNorm layer with running statistics, or the experts were trained
            with frozen ones, unless ``force``.
        OptionError: If neither ``base`` and ``experts`` nor ``force`` are given; or there are no batches, or none
            reaches a layer.
        NonFiniteError: If statistics are not finite.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]] * 2)], force=True).layers
        ('0',)
        >>> float(model[0].running_mean)
        3.5
    """
    norms = _tracked_norms(model)
    if not norms:
        raise UnsupportedError(
            f"{type(unwrap(model)).__name__} has no BatchNorm layer with running statistics: there is nothing to "
            "recalibrate."
        )
    chosen = norms if force else _live_norms(norms, base, experts)
    pools = {name: _Pool() for name in chosen}
    seen = 0
    with untouched(model, {}), ExitStack() as hooks, torch.no_grad():
        model.eval()
        for name, module in chosen.items():
            module.train()
            hooks.enter_context(module.register_forward_pre_hook(pools[name].hook))
        for batch in on_device_of(model, batches):
            (forward or call)(model, batch)
            seen += 1
    _require_complete(pools)
    for name, module in chosen.items():
        pools[name].write(module, seen)
    return Recalibration(tuple(chosen), seen, tuple(name for name in norms if name not in chosen))


def _tracked_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        plain_name(name): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _live_norms(
    norms: Mapping[str, _BatchNorm], base: WeightsLike | Base | None, experts: Sequence[ExpertLike]
) -> dict[str, _BatchNorm]:
    """The layers in which some expert was trained with live statistics."""
    if base is None or not experts:
        raise OptionError(
            "whether the experts were trained with live or with frozen BatchNorm cannot be seen from the merged model: "
            "pass `base` and `experts`, or force=True if you know that it was live."
        )
    base = Base.open(base)
    statistics = expert_statistics([open_expert(expert, base, strict=False) for expert in experts])
    live = live_experts(base.source, statistics)
    if not live:
        raise UnsupportedError(
            f"{listing(label for label, _ in statistics)} have the base's own BatchNorm statistics: they were trained "
            "with frozen ones, and so is their merge to be used. Recomputing would destroy it; force=True does it "
            "nevertheless."
        )
    if len(live) < len(statistics):
        logger.warning(
            "only %s of %d experts were trained with live BatchNorm statistics: no statistics fit both kinds.",
            listing(label for label, _ in live),
            len(statistics),
        )
    layers = {layer for _, found in live for layer in found}
    return {name: module for name, module in norms.items() if _is_among(name, layers)}


def _is_among(name: str, layers: set[str]) -> bool:
    """Whether a layer of the model is one of the base's, which may carry a prefix or lack it."""
    return name in layers or any(name.endswith(f".{layer}") or layer.endswith(f".{name}") for layer in layers)


class _Pool:
    """Mean and variance of a layer's inputs, pooled over batches by Chan's formula."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        dims = [d for d in range(x.ndim) if d != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.float(), dim=dims, correction=0)
        mean, squares = mean.cpu().double(), count * variance.cpu().double()
        shift, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def write(self, module: _BatchNorm, batches: int) -> None:
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(self.mean)
            module.running_var.copy_(self.squares / max(self.count - 1, 1))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(batches)


def _require_complete(pools: Mapping[str, _Pool]) -> None:
    unseen = [name for name, pool in pools.items() if pool.count == 0]
    if unseen:
        raise OptionError(f"no batch reached {listing(unseen)}: nothing was changed.")
    broken = [
        name for name, pool in pools.items() if not bool(torch.isfinite(pool.mean + pool.squares).all())
    ]
    if broken:
        raise NonFiniteError(
            f"the inputs of {listing(broken)} are NaN or infinite: the merge or its data are broken. Nothing was "
            "changed."
        )
