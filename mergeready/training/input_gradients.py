from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.weights.guard import untouched
from mergeready.weights.module import unwrap

InputLoss: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""The summed loss of a model on inputs that gradients are taken in: images, or embeddings of tokens."""


def input_gradient_distance(
    models: Sequence[nn.Module], losses: Sequence[InputLoss], inputs: Tensor
) -> Tensor:
    """How differently experts' losses depend on the same inputs: ``mean over x of ‖∇ₓ Lᵢ(x) − ∇ₓ Lⱼ(x)‖₂`` by pair.

    The input must be of floating point: for texts, embeddings, which ``losses`` feed to the encoder.

    *Evidence*: Pearson −0.41, −0.33 and −0.57 with the merged quality of pairs under task arithmetic, Iso-C and
    TSV-M, and the same order with 10 and with 200 calibration inputs (rank correlation 0.92), where gradients in
    parameters have 0.43; "Demystifying Mergeability" (arXiv 2601.22285), ViT-B/16. *Cost*: one forward and backward
    pass a model; 30 to 100 inputs.

    Args:
        models: The experts; they stay as they are.
        losses: Each one's summed loss on the inputs, such as with its own head and labels.
        inputs: The shared inputs, (inputs, …).

    Returns:
        float64, (models, models), zero on the diagonal.

    Raises:
        OptionError: If there are fewer than two models, their losses differ in number, the inputs are no
            floating-point numbers, or a loss does not depend on them.

    Example:
        >>> models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
        >>> for model, weight in zip(models, ([[3.0, 0.0]], [[0.0, 4.0]])):
        ...     model.weight.data = torch.tensor(weight)
        >>> losses = [lambda model, x: model(x).sum()] * 2
        >>> float(input_gradient_distance(models, losses, torch.ones(6, 2))[0, 1])
        5.0
    """
    if len(models) < 2 or len(models) != len(losses):
        raise OptionError(
            f"at least two models with a loss each are needed, not {len(models)} and {len(losses)}."
        )
    if not inputs.is_floating_point() or not len(inputs):
        raise OptionError("gradients need inputs of floating point, at least one: for texts pass embeddings.")
    found = torch.stack([_gradients(*pair, inputs) for pair in zip(models, losses, strict=True)])
    differences = found[:, None] - found[None, :]
    distances: Tensor = differences.norm(dim=-1).mean(-1)
    return distances


def _gradients(model: nn.Module, loss: InputLoss, inputs: Tensor) -> Tensor:
    """∇ₓ of the loss for each input, float64, (inputs, elements)."""
    inner = unwrap(model)
    with untouched(inner, {}), torch.enable_grad():
        inner.eval()
        x = inputs.detach().clone().requires_grad_()
        value = loss(model, x)
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise OptionError(f"the loss of {type(inner).__name__} does not depend on the inputs it was given.")
    found: Tensor = gradient.flatten(1).double().cpu()
    return found
