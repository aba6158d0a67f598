"""Penalties on a change of weights, each with its gradient: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp


def kronecker_drift(change: Tensor, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``R = tr(B D A Dᵀ)``, what a change D of a layer does to predictions on the factors' data; ``∇ = 2 B D A``.

    With ``B ⊗ A`` the Gauss-Newton matrix, R is the mean of ``‖J D‖²`` in the metric of the loss (TAK, arXiv
    2602.17385).

    Args:
        change: D, (outputs, columns).
        outputs: B, symmetric.
        inputs: A, symmetric.

    Returns:
        R and its gradient by D.

    Example:
        >>> value, gradient = kronecker_drift(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.eye(2))
        >>> float(value), gradient
        (15.0, tensor([[ 6., 12.]]))
    """
    half = outputs @ change @ inputs
    return (half * change).sum(), 2 * half


def jacobian_norm(
    outputs: Callable[[dict[str, Tensor]], Tensor], base: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``R = mean over examples of ‖J(x) τ‖₂``, J the derivative of the outputs at the *base*; its gradient by τ.

    How much a task vector changes, to first order, what the model says about other tasks' inputs. As J does not depend
    on τ, ``∇ = mean Jᵀ (Jτ / ‖Jτ‖)``: one forward-mode and one reverse-mode pass, no second derivatives. τJp, Yoshida
    et al. (ICLR 2025, openreview 1VwWi6zbxs), whose code takes the mean of norms as well.

    Args:
        outputs: From weights by name to outputs, (examples, …); must be differentiable in forward mode.
        base: Weights at which to differentiate.
        change: τ, for some or all of the names.

    Returns:
        R, and its gradient by name; zero for examples that τ does not change.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> value, gradient = jacobian_norm(lambda w: x @ w["w"], {"w": torch.zeros(2, 1)}, {"w": torch.ones(2, 1)})
        >>> float(value), gradient["w"].T
        (7.0, tensor([[3., 4.]]))
    """
    fixed = {name: value for name, value in base.items() if name not in change}
    at = {name: base[name] for name in change}
    tangent = {name: value.to(at[name].dtype) for name, value in change.items()}
    result, moved = cast("Any", jvp)(lambda some: outputs({**fixed, **some}), (at,), (tangent,))
    rows = moved.reshape(len(moved), -1)
    norms = torch.linalg.vector_norm(rows, dim=1)
    directions = torch.where(norms[:, None] > 0, rows / norms[:, None], 0.0) / len(rows)
    _, pull = cast("Any", vjp)(lambda some: outputs({**fixed, **some}), at)
    (gradient,) = pull(directions.reshape(result.shape))
    return norms.mean(), gradient


def overlap(A: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``R = Σₜ ‖A Aₜᵀ‖₁``, the sum of absolute inner products of rows, and its gradient by A.

    O-LoRA, Wang et al. (arXiv 2310.14152), as its code computes it. Zero where the adapters read orthogonal subspaces.

    Example:
        >>> value, gradient = overlap(torch.tensor([[1.0, -2.0]]), [torch.eye(2)])
        >>> float(value), gradient
        (3.0, tensor([[ 1., -1.]]))
    """
    value, gradient = A.new_zeros(()), torch.zeros_like(A)
    for other in others:
        products = A @ other.T
        value = value + products.abs().sum()
        gradient += products.sign() @ other
    return value, gradient
