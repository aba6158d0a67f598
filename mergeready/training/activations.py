from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import NonFiniteError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.merging.information import Collected
from mergeready.merging.regmean import TRANSPOSED
from mergeready.training.as_expert import as_expert
from mergeready.training.batches import Batches, call, mask_of, on_device_of
from mergeready.weights.open import WeightsLike


def input_grams(
    model: nn.Module,
    batches: Batches,
    *,
    base: WeightsLike | Base | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Collected:
    """The mean outer product of the inputs of each linear layer on an expert's own data, for the method ``regmean``.

    ``G = Σ x xᵀ / n`` over all inputs x of the layer, (in, in), for ``nn.Linear`` and for the ``Conv1D`` of
    transformers. Jin et al. (arXiv 2212.09849). Positions that a batch's attention mask calls padding do not
    count. Sums are fp32; memory is one matrix a layer.

    Left out are layers that never ran, and weights that another module uses too, such as a head tied to the embeddings.

    Args:
        model: The expert, plain or with a PEFT adapter. It is put into evaluation mode for the time being; nothing
            of it changes.
        batches: Inputs of its task; a few hundred examples suffice.
        base: The base, which gives parameters their names and is recorded with the result.
        forward: Runs the model on a batch; by default ``model(**batch)``, or ``model(batch[0])`` for tuples.

    Returns:
        Gram matrices by parameter, with ``^T`` behind the name where the layer stores its weight as (in, out). Merge
        methods take it as it is, or the file that its ``save`` writes.

    Raises:
        UnsupportedError: If no linear layer ran.
        OptionError: If there are no batches.
        NonFiniteError: If inputs are not finite.
        MergeReadyError: If the model does not fit the base.

    Example:
        >>> grams = input_grams(nn.Linear(2, 3), [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])
        >>> grams.read("weight")
        tensor([[1., 1.],
                [1., 2.]])
    """
    with as_expert(model, base) as seen, torch.no_grad():
        layers = linear_layers(model, seen.tensors)
        with GramHooks(layers) as hooks:
            for batch in on_device_of(model, batches):
                with hooks.masked(batch):
                    (forward or call)(model, batch)
        identity = seen.base
    grams = hooks.grams()
    if not grams:
        raise UnsupportedError(
            f"no linear layer of {type(model).__name__} ran: there is nothing for regmean to merge."
        )
    return Collected(grams, "input_grams", identity, {"positions": max(hooks.counts.values())})


def linear_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The linear layers whose weights are among some tensors and are used nowhere else.

    Returns:
        The name of each layer's Gram matrix to the layer, in the model's order.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in names and len(users[id(weight)]) == 1:
            if isinstance(module, nn.Linear):
                found[names[id(weight)]] = module
            elif type(module).__name__ == "Conv1D" and hasattr(
                module, "nf"
            ):  # transformers' transposed Linear
                found[names[id(weight)] + TRANSPOSED] = module
    return found


class GramHooks(ExitStack):
    """While open, adds up the outer products of the inputs of layers.

    Attributes:
        counts: Inputs seen, by Gram matrix.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, int] | None = None
        self._product, self._version = torch.empty(0), 0
        for name, layer in layers.items():
            self.enter_context(layer.register_forward_pre_hook(self._hook(name)))

    @contextmanager
    def masked(self, batch: Any) -> Iterator[None]:
        """Leave out the padding of a batch."""
        self._mask = mask_of(batch)
        try:
            yield
        finally:
            self._mask, self._last = None, None

    def grams(self) -> dict[str, Tensor]:
        """The means, on the CPU.

        Raises:
            NonFiniteError: If inputs were not finite; all layers are listed.
        """
        means = {name: (total / self.counts[name]).cpu() for name, total in self._sums.items()}
        broken = [name for name, mean in means.items() if not bool(torch.isfinite(mean).all())]
        if broken:
            raise NonFiniteError(
                f"inputs of {listing(broken)} are NaN or infinite: the expert or its data are broken."
            )
        return means

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            product, count = self._outer(inputs[0])
            if count == 0:
                return
            if name in self._sums:
                self._sums[name] += product
            else:
                self._sums[name] = product.clone()
            self.counts[name] = self.counts.get(name, 0) + count

        return add

    def _outer(self, x: Tensor) -> tuple[Tensor, int]:
        """Σ x xᵀ and the number of inputs; computed once for layers with one input, such as query, key and value."""
        if self._last is None or self._last[0] is not x or self._version != x._version:
            rows = x.detach()
            if self._mask is not None and self._mask.shape == x.shape[:-1]:
                rows = rows[self._mask.to(x.device)]
            rows = rows.reshape(-1, x.shape[-1]).float()
            self._product, self._version = rows.T @ rows, x._version
            self._last = (x, len(rows))
        return self._product, self._last[1]
