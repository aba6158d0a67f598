from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready.errors import NonFiniteError, OptionError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.factors import FactoredLayer, KroneckerFactors, factor_infos
from mergeready.merging.regmean import TRANSPOSED
from mergeready.training.activations import linear_layers
from mergeready.training.as_expert import SeenAsExpert, as_expert
from mergeready.training.batches import (
    Batches,
    Forward,
    forward_logits,
    labels_of,
    mask_of,
    on_device_of,
    positions,
    require_repeatable,
    size_of,
)
from mergeready.training.curvature import Labels
from mergeready.weights.open import WeightsLike
from mergeready.weights.state_dict import StateDictSource
from mergeready.weights.writer import write_file

LARGEST = 8192
"""Longest side of a factor by default: 256 MiB of fp32."""


def kronecker_factors(
    model: nn.Module,
    batches: Batches,
    *,
    base: WeightsLike | Base | None = None,
    labels: Labels = "sampled",
    draws: int = 1,
    forward: Forward | None = None,
    seed: int = 0,
    largest: int = LARGEST,
    label: str = "factors",
) -> KroneckerFactors:
    """Kronecker factors of the Gauss-Newton matrix of a model on an expert's data, for ``DriftPenalty``.

    For each linear layer (``nn.Linear``, and ``Conv1D`` of transformers) ``A = mean over positions of a aᵀ``, its
    inputs, with a 1 behind them where it has a bias, and ``B = mean over examples of E over labels y ~ p(y | x) of
    Σ over positions g gᵀ``, with ``g = −∂ log p(y | x) / ∂(its output)``. With softmax this is the Gauss-Newton matrix
    and the Fisher information at once. Martens and Grosse (arXiv 1503.05671); positions that share a weight are taken
    as independent ("expand" in Eschenhagen et al., arXiv 2311.00636), exactly right where there is one position.
    TAK (arXiv 2602.17385) computes them at the base, from 128 to 256 examples and one draw: so give the base model,
    with the task's head, for factors to share; or the expert itself.

    One backward pass a batch and draw; padding does not count. Memory is two square matrices a layer: for more,
    :func:`write_factors`.

    Args:
        model: The model, plain or with a PEFT adapter, which is folded in. It is put into evaluation mode for the time
            being; nothing of it changes, gradients and random state included.
        batches: Inputs of the expert's task.
        base: The base, which gives parameters their names and is recorded with the result; layers that it lacks, such
            as the task's head, are left out.
        labels: Where labels come from: ``sampled`` from the model; ``expected``, the expectation over all classes, one
            backward pass a class; ``true``, those in the batches, which gives the empirical Fisher.
        draws: How many labels are drawn for each example.
        forward: Gives the logits of a batch; by default ``model(**batch).logits``, or ``model(batch[0])`` for tuples.
        seed: Seed of the draws.
        largest: Layers with a longer side, such as a head over a vocabulary, are left out.
        label: How others shall call the expert.

    Raises:
        OptionError: If an argument is out of range, or there are no batches.
        UnsupportedError: If no linear layer of that size ran.
        NonFiniteError: If inputs or gradients are not finite; all layers are listed.
        MergeReadyError: If the model does not fit the base.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> found = kronecker_factors(model, [torch.tensor([[1.0], [3.0]])], labels="expected")
        >>> B, A = found.read("weight")
        >>> A, B  # the mean of x², and p δ − p pᵀ
        (tensor([[5.]]), tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]]))
    """
    collector = _Collector(labels, draws, forward or forward_logits, seed)
    with as_expert(model, base) as seen, torch.enable_grad():
        modules, layers = _layers(model, seen, largest)
        pairs = collector.collect(model, batches, modules, layers)
        identity = seen.base
    kept = {name: layers[name] for name in pairs}
    _require_some(kept, model)
    return KroneckerFactors.of(pairs, kept, label=label, base=identity, facts=collector.facts)


def write_factors(
    path: str | Path,
    model: nn.Module,
    batches: Batches,
    *,
    base: WeightsLike | Base | None = None,
    labels: Labels = "sampled",
    draws: int = 1,
    forward: Forward | None = None,
    seed: int = 0,
    largest: int = LARGEST,
    label: str = "factors",
    memory: int = 2 * 10**9,
    dtype: torch.dtype = torch.float32,
) -> KroneckerFactors:
    """Collect factors into a file, as many layers at a time as fit into memory, one pass over the data for each group.

    What is written is what :func:`kronecker_factors` finds, whatever the grouping. See there for the other arguments.

    Args:
        path: The file; ``.factors.safetensors`` is the customary ending.
        model: The model.
        batches: A list or DataLoader that gives the same batches each time, not an iterator.
        base: The base.
        labels: Where labels come from.
        draws: How many labels are drawn for each example.
        forward: Gives the logits of a batch.
        seed: Seed of the draws.
        largest: Layers with a longer side are left out.
        label: How others shall call the expert.
        memory: Bytes for factors at a time.
        dtype: Of the factors in the file; bfloat16 halves it.

    Returns:
        The factors, opened.

    Raises:
        OSError: If it cannot be written; an older file is left as it was then.
        MergeReadyError: As :func:`kronecker_factors`.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "law.factors.safetensors"
        >>> write_factors(path, nn.Linear(2, 2), [torch.ones(4, 2)], label="law").label
        'law'
    """
    require_repeatable(batches)
    if memory < 1:
        raise OptionError(f"`memory` must be a positive number of bytes, not {memory}.")
    collector = _Collector(labels, draws, forward or forward_logits, seed)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with as_expert(model, base) as seen, torch.enable_grad():
        modules, layers = _layers(model, seen, largest)
        facts = collector.look(model, batches, modules)
        kept = {name: layer for name, layer in layers.items() if name in collector.ran}
        _require_some(kept, model)
        about = KroneckerFactors(label, seen.base, kept, StateDictSource({}), facts)
        with write_file(path, factor_infos(kept, dtype), about.metadata()) as writer:
            for group in _groups(kept, memory):
                chosen = {name: modules[name] for name in group}
                for name, (outputs, inputs) in collector.collect(model, batches, chosen, kept).items():
                    writer.write(f"outputs/{name}", outputs)
                    writer.write(f"inputs/{name}", inputs)
    return KroneckerFactors.load(path)


class _Collector:
    """Passes over the data; each draws the same labels.

    Attributes:
        ran: Names of the layers that ran in the last pass.
    """

    def __init__(self, labels: Labels, draws: int, forward: Forward, seed: int) -> None:
        if labels not in get_args(Labels):
            raise OptionError(f"`labels` must be sampled, expected or true, not {labels!r}.")
        if draws < 1 or (draws > 1 and labels != "sampled"):
            raise OptionError(f"`draws` must be at least 1, and 1 for labels={labels!r}, not {draws}.")
        self._labels, self._draws, self._forward, self._seed = labels, draws, forward, seed
        self.ran: set[str] = set()
        self.facts: dict[str, Any] = {}

    def look(self, model: nn.Module, batches: Batches, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Which layers run, without computing anything about them; returns how factors are collected."""
        examples, self.ran = 0, set()
        with torch.no_grad(), _Hooks(modules) as hooks:
            for batch in on_device_of(model, batches):
                self._forward(model, batch)
                examples += size_of(batch)
                self.ran |= {name for name, _, _ in hooks.taken()}
        return self._facts(examples)

    def collect(
        self,
        model: nn.Module,
        batches: Batches,
        modules: Mapping[str, nn.Module],
        layers: Mapping[str, FactoredLayer],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of some layers, those that never ran left out; ``facts`` says how."""
        generator = torch.Generator().manual_seed(self._seed)
        outer: dict[str, Tensor] = {}  # Σ g gᵀ
        inner: dict[str, Tensor] = {}  # Σ a aᵀ
        seen: dict[str, int] = {}
        examples = 0
        for module in modules.values():
            module.get_parameter("weight").requires_grad_()
        with _Hooks(modules) as hooks:
            for batch in on_device_of(model, batches):
                logits = self._forward(model, batch)
                calls = hooks.taken()
                mask = mask_of(batch)
                examples += size_of(batch)
                _add_inputs(inner, seen, calls, layers, mask)
                for loss in self._losses(logits, batch, generator):
                    outputs = [output for _, _, output in calls]
                    gradients = torch.autograd.grad(loss, outputs, allow_unused=True, retain_graph=True)
                    for (name, _, _), gradient in zip(calls, gradients, strict=True):
                        if gradient is not None:
                            _add(outer, name, _rows(gradient, mask))
        self.ran, self.facts = set(seen), self._facts(examples)
        pairs = {}
        for name in seen:
            side = layers[name].outputs
            B = outer[name] / (examples * self._draws) if name in outer else torch.zeros(side, side)
            pairs[name] = (B.cpu(), (inner[name] / seen[name]).cpu())
        _require_finite(pairs)
        return pairs

    def _facts(self, examples: int) -> dict[str, Any]:
        return {"examples": examples, "labels": self._labels, "draws": self._draws, "seed": self._seed}

    def _losses(self, logits: Tensor, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        """Negative log-likelihoods, summed over the batch, whose gradients' outer products add up to B."""
        if logits.shape[-1] < 2:
            raise OptionError(
                "the model has one output, so its likelihood is not known: factors need classes."
            )
        if logits.ndim > 2 and self._labels != "sampled":
            raise OptionError(
                f"the model has logits for many positions: labels={self._labels!r} fits one each."
            )
        rows = positions(logits, batch).float()
        if self._labels == "sampled":
            probabilities = rows.detach().softmax(-1).cpu()
            for _ in range(self._draws):
                drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                yield cross_entropy(rows, drawn.to(rows.device), reduction="sum")
        elif self._labels == "true":
            yield cross_entropy(rows, labels_of(batch).reshape(-1), reduction="sum")
        else:
            log_probabilities = rows.log_softmax(-1)
            for value in log_probabilities.unbind(-1):
                # The square of the root weighs each class by its probability.
                yield -(value.detach().mul(0.5).exp() * value).sum()


class _Hooks(ExitStack):
    """While open, records what goes into and out of layers: name, inputs, and outputs to differentiate by."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._calls: list[tuple[str, Tensor, Tensor]] = []
        for name, module in modules.items():
            self.enter_context(module.register_forward_hook(partial(self._record, name)))

    def taken(self) -> list[tuple[str, Tensor, Tensor]]:
        """The calls since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _record(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._calls.append((name, inputs[0].detach().clone(), output))
        return output.clone()  # what happens to it in place must not change which tensor is differentiated by


def _layers(
    model: nn.Module, seen: SeenAsExpert, largest: int
) -> tuple[dict[str, nn.Module], dict[str, FactoredLayer]]:
    """The linear layers that are not too large, by the name of their weight."""
    if largest < 1:
        raise OptionError(f"`largest` must be at least 1, not {largest}.")
    names = {id(tensor): name for name, tensor in seen.tensors.items()}
    modules, layers = {}, {}
    for key, module in linear_layers(model, seen.tensors).items():
        name, transposed = key.removesuffix(TRANSPOSED), key.endswith(TRANSPOSED)
        shape = tuple(module.get_parameter("weight").shape)
        outputs, inputs = reversed(shape) if transposed else shape
        layer = FactoredLayer(outputs, inputs, names.get(id(getattr(module, "bias", None))), transposed)
        if max(layer.outputs, layer.columns) <= largest:
            modules[name], layers[name] = module, layer
    _require_some(layers, model)
    return modules, layers


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's inputs or gradients as rows, without padding."""
    if mask is not None and mask.shape == tensor.shape[:-1]:
        tensor = tensor[mask.to(tensor.device)]
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    product = rows.T @ rows
    sums[name] = sums[name].add_(product) if name in sums else product


def _add_inputs(
    sums: dict[str, Tensor],
    seen: dict[str, int],
    calls: Sequence[tuple[str, Tensor, Tensor]],
    layers: Mapping[str, FactoredLayer],
    mask: Tensor | None,
) -> None:
    for name, value, _ in calls:
        rows = _rows(value, mask)
        if not len(rows):
            continue
        if layers[name].bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        _add(sums, name, rows)
        seen[name] = seen.get(name, 0) + len(rows)


def _groups(layers: Mapping[str, FactoredLayer], memory: int) -> Iterator[list[str]]:
    """Layers whose factors fit into memory together; one at least."""
    group: list[str] = []
    used = 0
    for name, layer in layers.items():
        size = 4 * (layer.outputs**2 + layer.columns**2)
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def _require_some(layers: Mapping[str, FactoredLayer], model: nn.Module) -> None:
    if not layers:
        raise UnsupportedError(
            f"no linear layer of {type(model).__name__} that is small enough ran: there is nothing to factor."
        )


def _require_finite(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    broken = [name for name, pair in pairs.items() if not all(bool(torch.isfinite(f).all()) for f in pair)]
    if broken:
        raise NonFiniteError(
            f"inputs or gradients of {listing(broken)} are NaN or infinite: the model or its data are broken, or its "
            "dtype is too narrow; collect in float32."
        )
