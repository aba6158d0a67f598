from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import NonFiniteError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.delta import Delta, Dense, LowRank, dense
from mergeready.experts.live import LiveExpert
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import DeltaTaskVector, TaskVector
from mergeready.merging.parameter import add_delta, merged_delta
from mergeready.merging.registry import make_method
from mergeready.training.batches import (
    Batches,
    Forward,
    forward_logits,
    on_device_of,
    one_each,
    positions,
    require_repeatable,
)
from mergeready.training.scratch import scratch
from mergeready.weights.guard import random_state_kept
from mergeready.weights.open import WeightsLike


@dataclass(frozen=True)
class AdaMerging:
    """Learned coefficients.

    Attributes:
        coefficients: Parameter to one factor an expert.
        entropy: Mean entropy over the tasks in nats, at each step before its update, and after the last.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    entropy: tuple[float, ...]

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """For merges of the same experts in the same order: ``merge(base, experts, overrides=learned.overrides)``."""
        return {f"^{re.escape(name)}$": {"weights": list(row)} for name, row in self.coefficients.items()}


def adamerging(
    model: nn.Module,
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    batches: Sequence[Batches],
    *,
    forward: Forward | Sequence[Forward] | None = None,
    steps: int = 500,
    lr: float = 1e-3,
    initial: float = 0.3,
) -> AdaMerging:
    """Learn how much of each expert each parameter takes, from unlabelled data: layer-wise AdaMerging.

    ``θₗ = θ₀ₗ + Σₖ λₗₖ τₖₗ`` with one λ for each parameter l and expert k, found by Adam as the minimum of
    ``Σ over tasks of the mean entropy of softmax(f(x; θ))``. Yang et al., "AdaMerging: Adaptive Model Merging for
    Multi-Task Learning" (arXiv 2310.02575), the layer-wise variant; start, learning rate and 500 steps, with batches
    of 16, are those of the authors' code.

    Only the model's own gradients are needed, since ``∂/∂λₗₖ = ⟨∂/∂θₗ, τₖₗ⟩``: memory is that of training without an
    optimizer, plus base and task vectors in their most compact form.

    Args:
        model: Any model of the base's architecture, such as one of the experts. A copy of it does the work.
        base: The base.
        experts: The experts that will be merged, in that order.
        batches: Unlabelled data of each task, in a form that can be gone through repeatedly; a task need not have an
            expert. Each step takes the next batch of every task.
        forward: Gives the logits of a batch, one for all or one a task (a task's own head belongs here); by default
            ``model(**batch).logits``, or ``model(batch[0])`` for tuples.
        steps: Updates.
        lr: Adam's learning rate.
        initial: All coefficients before the first step.

    Raises:
        OptionError: If an option is out of range, or data cannot be repeated.
        NonFiniteError: If the entropy is not finite.
        MergeReadyError: As ``open_expert`` does.

    Example:
        >>> base = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(base.weight)
        >>> expert = {"weight": 3 * torch.eye(2)}
        >>> learned = adamerging(base, base, [expert], [[torch.eye(2)]], steps=3, lr=0.1)
        >>> learned.entropy[-1] < learned.entropy[0], list(learned.overrides)
        (True, ['^weight$'])
    """
    _check_options(steps, lr, initial)
    live = scratch(model, base)
    vectors = [_held(open_expert(expert, live.base, strict=False).vector, live) for expert in experts]
    if not vectors or not batches:
        raise OptionError("`experts` and `batches` need at least one each.")
    runs = one_each(forward, forward_logits, len(batches))
    for data in batches:
        require_repeatable(data)
    with random_state_kept(), live.adapter_off(), torch.enable_grad():
        return _Learner(live, vectors).learn(batches, runs, steps, lr, initial)


class _Learner:
    """Coefficients, and a model that computes with the weights they give."""

    def __init__(self, live: LiveExpert, vectors: Sequence[TaskVector]) -> None:
        self._live, self._vectors = live, vectors
        self._names = [name for name in live.targets if any(name in vector for vector in vectors)]
        self._base = {name: live.base.source.read(name).clone() for name in self._names}
        for name, target in live.targets.items():
            target.requires_grad_(name in self._base)
        self._targets = [live.targets[name] for name in self._names]

    def learn(
        self, batches: Sequence[Batches], runs: Sequence[Forward], steps: int, lr: float, initial: float
    ) -> AdaMerging:
        shape = (len(self._names), len(self._vectors))
        coefficients = torch.full(shape, initial, dtype=torch.float64)
        optimizer = torch.optim.Adam([coefficients], lr=lr)
        streams = [_endless(self._live.model, data) for data in batches]
        entropies: list[float] = []
        self._write(coefficients)
        for _ in range(steps):
            coefficients.grad = torch.zeros(shape, dtype=torch.float64)
            entropies.append(self._accumulate(coefficients.grad, [next(s) for s in streams], runs))
            optimizer.step()
            self._write(coefficients)
        with torch.no_grad():
            last = [
                entropy(run(self._live.model, batch), batch)
                for run, batch in zip(runs, [next(s) for s in streams], strict=True)
            ]
        entropies.append(_finite(float(sum(last)) / len(last)))
        rows = zip(self._names, coefficients.tolist(), strict=True)
        return AdaMerging({name: tuple(row) for name, row in rows}, tuple(entropies))

    def _accumulate(self, total: Tensor, batches: Sequence[Any], runs: Sequence[Forward]) -> float:
        """Add each task's derivatives by the coefficients; returns the mean entropy."""
        values: list[float] = []
        for run, batch in zip(runs, batches, strict=True):
            value = entropy(run(self._live.model, batch), batch)
            values.append(_finite(float(value.detach())))
            gradients = torch.autograd.grad(value, self._targets, allow_unused=True)
            for row, name, gradient in zip(total, self._names, gradients, strict=True):
                if gradient is not None:
                    for slot, vector in enumerate(self._vectors):
                        if name in vector:
                            row[slot] += inner(gradient, vector[name])
        return sum(values) / len(values)

    @torch.no_grad()
    def _write(self, coefficients: Tensor) -> None:
        method = make_method("task_arithmetic")
        infos = self._live.base.source.infos
        for name, weights in zip(self._names, coefficients.tolist(), strict=True):
            delta = merged_delta(method, name, infos[name], self._vectors, weights)
            target = self._live.targets[name]
            if delta is not None:
                target.copy_(add_delta(self._base[name], delta, 1.0, target.dtype))


def entropy(logits: Tensor, batch: Any) -> Tensor:
    """Mean entropy of softmax(logits) in nats, over examples and positions that are not padding.

    >>> round(float(entropy(torch.zeros(3, 4), None)), 4)  # ln 4
    1.3863
    """
    log_probabilities = positions(logits, batch).float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def inner(gradient: Tensor, delta: Delta) -> float:
    """⟨g, τ⟩; for low-rank τ = BA as ⟨Bᵀg, A⟩, without making it dense."""
    g = gradient.detach().float()
    if isinstance(delta, LowRank):
        matrix = g.reshape(len(delta.B), -1)
        return float(((delta.B.float().T @ matrix) * delta.A.float()).sum())
    return float((g * dense(delta)).sum())


def _held(vector: TaskVector, live: LiveExpert) -> TaskVector:
    """A task vector in memory, where the model is: it is read at every step."""
    held: dict[str, Delta] = {}
    for name in vector:
        if name in live.targets:
            delta, device = vector[name], live.targets[name].device
            if isinstance(delta, LowRank):
                held[name] = LowRank(delta.B.to(device), delta.A.to(device), delta.shape)
            else:
                held[name] = Dense(dense(delta).to(device))
    return DeltaTaskVector(held, vector.infos, vector.base, vector.label)


def _endless(model: nn.Module, batches: Batches) -> Any:
    return itertools.chain.from_iterable(on_device_of(model, batches) for _ in itertools.count())


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(
            "the entropy is NaN or infinite: the experts, their data or the learning rate are broken."
        )
    return value


def _check_options(steps: int, lr: float, initial: float) -> None:
    if steps < 1:
        raise OptionError(f"`steps` must be at least 1, not {steps}.")
    if not 0 < lr < math.inf:
        raise OptionError(f"`lr` must be positive and finite, not {lr}.")
    if not math.isfinite(initial):
        raise OptionError(f"`initial` must be finite, not {initial}.")
