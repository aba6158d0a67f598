"""How much of a step's loss and gradient the hardest examples carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from mergeready.errors import OptionError, listing
from mergeready.training.batches import (
    Forward,
    examples_of,
    forward_logits,
    labels_of,
)
from mergeready.weights.guard import untouched
from mergeready.weights.module import unwrap

HARDEST = 0.1
"""The share of examples that counts as the hardest."""

ExampleLoss: TypeAlias = Callable[[Callable[[Any], Any], Any], Tensor]
"""The loss of a batch of one example: called with the model as a function of a batch, and the batch."""


def share_of_hardest(
    values: ArrayLike, share: float = HARDEST, *, difficulty: ArrayLike | None = None
) -> float:
    """Share of a sum that its hardest examples carry: of the loss, or of gradient norms, of one step.

    ``Σ_{i ∈ hardest} vᵢ / Σ vᵢ``; where ``share · n`` is no whole number, the last example counts in part. ``share``
    itself where all carry alike, 1 where the hardest carry all.

    Args:
        values: One number an example, not negative.
        share: Which share of examples is hardest, in (0, 1].
        difficulty: What to rank by, such as an independent model's loss; by default the values themselves, which
            gives the largest share there can be.

    Returns:
        A number in [0, 1]; NaN where the values sum to zero or there are none.

    Raises:
        OptionError: If ``share`` is out of range, a value is negative or not finite, or lengths differ.

    Example:
        >>> share_of_hardest([1.0] * 9 + [9.0])
        0.5
    """
    if not 0 < share <= 1:
        raise OptionError(f"`share` must be in (0, 1], not {share}.")
    carried = np.asarray(values, dtype=np.float64).reshape(-1)
    ranks = carried if difficulty is None else np.asarray(difficulty, dtype=np.float64).reshape(-1)
    if len(ranks) != len(carried):
        raise OptionError(f"{len(carried)} values cannot be ranked by {len(ranks)} difficulties.")
    if not np.all(carried >= 0) or not np.all(np.isfinite(carried)) or np.isnan(ranks).any():
        raise OptionError("values must be finite and not negative, difficulties must not be NaN.")
    largest = carried.max(initial=0.0)
    if not largest:
        return math.nan
    carried = carried / largest  # sums of very large or very small values would leave the range of floats
    ordered = carried[np.argsort(-ranks, kind="stable")]
    wanted = share * len(ordered)
    whole = math.floor(wanted + 1e-9)
    part = wanted - whole
    hardest = ordered[:whole].sum() + (part * ordered[whole] if whole < len(ordered) else 0)
    return float(hardest / ordered.sum())


def head_gradient_norms(el2n: Tensor, inputs: Tensor, *, bias: bool = True) -> Tensor:
    """The norm of each example's loss gradient in the last layer's weights, in closed form.

    Where logits are linear in the head, ``z = W h + b``, the cross-entropy's gradient is ``(p − y) hᵀ`` in W and ``p
    − y`` in b, so its norm is ``‖p − y‖₂ · √(‖h‖² + 1)``: EL2N times the size of the input. Exact for that layer; it
    says nothing of the layers below. *Cost*: none beside the logits.

    Args:
        el2n: ‖p − y‖₂ of each example.
        inputs: What the head was given, (examples, features).
        bias: Whether the head has a bias that is trained.

    Raises:
        OptionError: If shapes do not fit.

    Example:
        >>> head_gradient_norms(torch.tensor([0.5]), torch.tensor([[3.0, 4.0]]), bias=False)
        tensor([2.5000])
    """
    if inputs.ndim != 2 or len(inputs) != len(el2n):
        raise OptionError(
            f"inputs {tuple(inputs.shape)} are not one vector for each of {len(el2n)} examples: only where the head "
            "sees one vector an example is the gradient's norm a product."
        )
    size = inputs.to(el2n.dtype).square().sum(1)
    return el2n * (size + 1 if bias else size).sqrt()


def gradient_norms(
    model: nn.Module,
    batch: Any,
    *,
    parameters: Sequence[str] | None = None,
    forward: Forward | None = None,
    loss: ExampleLoss | None = None,
) -> Tensor:
    """The norm of each example's own loss gradient, over all trained parameters: GraNd of one model.

    ``‖∇_θ ℓ(x, y)‖₂`` by ``torch.func``, in evaluation mode, one example after the other: models of transformers cannot
    be mapped over examples. Paul et al. (arXiv 2107.07075), definition 2.1. *Cost*: a forward and a backward
    pass an example, alone, and one copy of the gradients.

    Args:
        model: The model; it stays as it is.
        batch: A batch with labels, on the model's device.
        parameters: Names of the parameters that count; by default all that are trained.
        forward: Gives logits; by default ``model(**batch).logits``, or ``model(batch[0])`` for tuples.
        loss: The loss of one example; by default the cross-entropy of its logits.

    Returns:
        fp32, (examples,).

    Raises:
        OptionError: If a name is not of a trained parameter; all are listed.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> gradient_norms(model, (torch.tensor([[3.0, 4.0]]), torch.tensor([0])))  # √½ · 5
        tensor([3.5355])
    """
    inner = unwrap(model)
    trained = {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
    unknown = [name for name in parameters or () if name not in trained]
    if unknown:
        raise OptionError(f"{listing(unknown)} are no trained parameters of {type(inner).__name__}.")
    chosen = {name: trained[name] for name in (trained if parameters is None else parameters)}
    fixed: dict[str, Tensor] = {
        name: tensor.detach()
        for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]
        if name not in chosen
    }
    value = loss or _cross_entropy(forward or forward_logits)

    def of_one(weights: dict[str, Tensor], example: Any) -> Tensor:
        return value(_Called(inner, weights, fixed), example).float().sum()

    with untouched(inner, {}):
        inner.eval()
        norms = [_norm(grad(of_one)(chosen, example)) for example in examples_of(batch)]
    return torch.stack(norms)


def _norm(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([values.float().square().sum() for values in gradients.values()]).sum().sqrt()


class _Called(nn.Module):
    """The model as a function of its weights: what looks like a module to ``forward``."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._model: Callable[..., Any] = partial(functional_call, model, {**weights, **fixed})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(args, kwargs)


def _cross_entropy(forward: Forward) -> ExampleLoss:
    def of_example(model: Any, example: Any) -> Tensor:
        return cross_entropy(forward(model, example).float(), labels_of(example))

    return of_example
