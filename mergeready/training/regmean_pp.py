from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.base import Base
from mergeready.experts.live import LiveExpert
from mergeready.experts.open import ExpertLike, open_expert
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.information import Collected
from mergeready.merging.method import MergeMethod
from mergeready.merging.parameter import add_delta, check_weights, merged_delta
from mergeready.merging.registry import make_method
from mergeready.merging.regmean import RegMean
from mergeready.training.activations import GramHooks, linear_layers
from mergeready.training.batches import Batches, call, on_device_of, one_each, require_repeatable
from mergeready.training.scratch import scratch
from mergeready.weights.guard import random_state_kept
from mergeready.weights.open import WeightsLike

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")

Run = Callable[[nn.Module, Any], object]


class _Reached(BaseException):
    """Ends a forward pass early; no error, so that no model mistakes it for one."""


def regmean_pp(
    model: nn.Module,
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    batches: Sequence[Batches],
    *,
    alpha: float = 0.9,
    weights: Sequence[float] | None = None,
    rest: str = "average",
    forward: Run | Sequence[Run] | None = None,
) -> list[Collected]:
    """Gram matrices for ``regmean`` that see what the merged model's layers will see: RegMean++.

    RegMean collects each expert's layer inputs inside that expert, while the merged layer gets its inputs from merged
    layers. Here the model is merged block by block: block l of expert i runs on what the merged blocks below make of
    expert i's data; the Gram matrices of its layers are collected there, and the block is merged before the next.
    Nguyen et al., "RegMean++" (arXiv 2508.03121). A block is what carries a number in parameter names, such as
    ``encoder.layer.3``; a linear layer outside any is a block of its own. Blocks come in the order in which they run.

    Each block costs one pass of every expert's data through the model up to that block.

    Args:
        model: Any model of the base's architecture, such as one of the experts. A copy of it does the work.
        base: The base.
        experts: The experts that will be merged, in that order.
        batches: Each expert's data, as for ``input_grams``, in a form that can be gone through repeatedly.
        alpha: As for ``regmean``.
        weights: One factor an expert; 1 each by default.
        rest: As for ``regmean``: what merges the other parameters.
        forward: Runs the model on a batch; one for all or one an expert.

    Returns:
        One source an expert: ``merge(base, experts, "regmean", grams=regmean_pp(...), alpha=..., weights=...)``, with
        the same ``alpha``, ``weights`` and ``rest``, is the RegMean++ merge.

    Raises:
        OptionError: If numbers of experts and data differ, data cannot be repeated, or an option is out of range.
        UnsupportedError: If no linear layer of the base ran.
        MergeReadyError: As ``open_expert`` does.

    Example:
        >>> base, experts = nn.Linear(2, 2), [nn.Linear(2, 2), nn.Linear(2, 2)]
        >>> for expert in experts:
        ...     _ = expert.load_state_dict({n: 1.1 * p for n, p in base.state_dict().items()})
        >>> data = [[torch.eye(2)], [torch.ones(4, 2)]]
        >>> regmean_pp(experts[0], base, experts, data)[1].read("weight")
        tensor([[1., 1.],
                [1., 1.]])
    """
    live = scratch(model, base)
    vectors = [open_expert(expert, live.base, strict=False).vector for expert in experts]
    settings = _Settings(alpha, check_weights(weights, len(vectors)), rest)
    if len(batches) != len(vectors):
        raise OptionError(f"`batches` are data of {len(batches)} experts, where there are {len(vectors)}.")
    runs = one_each(forward, call, len(batches))
    for data in batches:
        require_repeatable(data)
    with random_state_kept(), live.adapter_off(), torch.no_grad():
        grams = _Pass(live, vectors, settings).run(batches, runs)
    facts = {"layers": "merged", "alpha": alpha, "weights": settings.weights, "rest": rest}
    return [Collected(found, "input_grams", live.base.identity, facts) for found in grams]


@dataclass(frozen=True)
class _Settings:
    alpha: float
    weights: Sequence[float]
    rest: str

    def regmean(self, grams: Sequence[Mapping[str, Tensor]]) -> MergeMethod:
        return RegMean(
            grams=[Collected(found, "input_grams") for found in grams], alpha=self.alpha, rest=self.rest
        )


@dataclass(frozen=True)
class _Block:
    """Modules that are merged together.

    Attributes:
        module: Where they are in the model.
        layers: Their linear layers, by Gram matrix.
        names: All their parameters, by base name.
        once: Whether a forward pass runs the block once only.
    """

    module: nn.Module
    layers: Mapping[str, nn.Module]
    names: Sequence[str]
    once: bool


@dataclass(frozen=True)
class _Pass:
    """The work on a model whose weights may be overwritten."""

    live: LiveExpert
    vectors: Sequence[TaskVector]
    settings: _Settings

    def run(self, batches: Sequence[Batches], runs: Sequence[Run]) -> list[dict[str, Tensor]]:
        self._write_merged(make_method(self.settings.rest), list(self.live.targets))
        collected: list[dict[str, Tensor]] = [{} for _ in self.vectors]
        for block in self._blocks(next(on_device_of(self.live.model, batches[0])), runs[0]):
            found = []
            for vector, data, forward in zip(self.vectors, batches, runs, strict=True):
                self._write_expert(vector, block.names)
                found.append(self._grams(block, data, forward))
            for all_grams, grams in zip(collected, found, strict=True):
                all_grams.update(grams)
            self._write_merged(self.settings.regmean(found), block.names)
        return collected

    def _blocks(self, batch: Any, forward: Run) -> Iterator[_Block]:
        """The blocks that run, in the order in which they do."""
        layers = linear_layers(self.live.model, self.live.targets)
        paths = {id(module): path for path, module in self.live.model.named_modules()}
        home = {key: _block_path(paths[id(layer)]) for key, layer in layers.items()}
        calls: dict[str, int] = {}
        with ExitStack() as hooks:
            for path in dict.fromkeys(home.values()):
                module = self.live.model.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(_counter(calls, path)))
            forward(self.live.model, batch)
        if not calls:
            raise UnsupportedError(
                f"no linear layer of {type(self.live.model).__name__} ran: there is nothing for regmean to merge."
            )
        names = {id(tensor): name for name, tensor in self.live.targets.items()}
        for path, count in calls.items():
            module = self.live.model.get_submodule(path)
            inside = [names[id(p)] for p in module.parameters() if id(p) in names]
            yield _Block(module, {k: layers[k] for k in layers if home[k] == path}, inside, count == 1)

    def _grams(self, block: _Block, data: Batches, forward: Run) -> dict[str, Tensor]:
        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _Reached

        with GramHooks(block.layers) as hooks:
            if block.once:
                hooks.enter_context(block.module.register_forward_hook(stop))
            for batch in on_device_of(self.live.model, data):
                with hooks.masked(batch):
                    try:
                        forward(self.live.model, batch)
                    except _Reached:
                        continue
        return hooks.grams()

    def _write_expert(self, vector: TaskVector, names: Sequence[str]) -> None:
        self._write_merged(make_method("task_arithmetic"), names, [vector])

    def _write_merged(
        self, method: MergeMethod, names: Sequence[str], vectors: Sequence[TaskVector] | None = None
    ) -> None:
        weights = self.settings.weights if vectors is None else [1.0]
        base = self.live.base.source
        for name in names:
            target, info = self.live.targets[name], base.infos[name]
            delta = merged_delta(method, name, info, self.vectors if vectors is None else vectors, weights)
            value = base.read(name)
            target.copy_(value if delta is None else add_delta(value, delta, 1.0, target.dtype))


def _block_path(path: str) -> str:
    """The numbered part that a module belongs to, or the module itself.

    >>> _block_path("bert.encoder.layer.3.output.dense"), _block_path("pooler.dense"), _block_path("0")
    ('bert.encoder.layer.3', 'pooler.dense', '0')
    """
    found = _NUMBERED.match(path)
    return found.group() if found else path


def _counter(calls: dict[str, int], path: str) -> Callable[..., None]:
    def count(module: nn.Module, inputs: Any) -> None:
        calls[path] = calls.get(path, 0) + 1

    return count
