"""Penalties and their gradients against explicit Jacobians, Kronecker products and finite differences, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from mergeready.training.penalties import jacobian_norm, kronecker_drift, overlap
from tests.training.small import Net, examples


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_is_gradient(value: Callable[[Tensor], Tensor], at: Tensor, gradient: Tensor) -> None:
    """By central differences in every coordinate."""
    step = 1e-5
    for i in range(at.numel()):
        nudge = torch.zeros(at.numel(), dtype=torch.float64)
        nudge[i] = step
        slope = (value(at + nudge.reshape(at.shape)) - value(at - nudge.reshape(at.shape))) / (2 * step)
        torch.testing.assert_close(gradient.reshape(-1)[i], slope, rtol=1e-5, atol=1e-7)


def test_drift_against_the_dense_quadratic_form() -> None:
    x, g, D = normal(9, 4), normal(9, 3, seed=1), normal(3, 4, seed=2)
    A, B = x.T @ x / 9, g.T @ g / 9
    value, gradient = kronecker_drift(D, B, A)
    flat = D.reshape(-1)
    torch.testing.assert_close(value, flat @ torch.kron(B, A) @ flat)
    assert_is_gradient(lambda d: kronecker_drift(d, B, A)[0], D, gradient)


def test_drift_of_one_example_is_the_curvature_of_the_loss() -> None:
    """½ R is the second-order term of KL(p(θ0) ‖ p(θ0 + D)) for a linear classifier."""
    x, W, D = normal(4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    p = (W @ x).softmax(0)
    value, _ = kronecker_drift(D, torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    step = 1e-3
    q = ((W + step * D) @ x).log_softmax(0)
    divergence = (p * (p.log() - q)).sum() / step**2
    torch.testing.assert_close(value / 2, divergence, rtol=1e-2, atol=1e-6)


def test_jacobian_norm_is_that_of_the_explicit_jacobian() -> None:
    model = copy.deepcopy(Net()).double().eval()
    x = examples(1, part=0, count=5)[0].double()
    base = {n: p.detach() for n, p in model.named_parameters()}
    change = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(base.items()) if "norm" not in n}
    seen = {n: t.clone() for n, t in base.items()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (x,))

    value, gradient = jacobian_norm(outputs, base, change)
    J = jacrev(outputs)(base)
    moved = sum(J[n].flatten(2) @ change[n].reshape(-1) for n in change)
    torch.testing.assert_close(value, moved.norm(dim=1).mean())
    unit = moved / moved.norm(dim=1, keepdim=True) / 5
    for n in change:
        exact = torch.einsum("ec,ec...->...", unit, J[n])
        torch.testing.assert_close(gradient[n], exact)
    name = "layers.0.bias"
    assert_is_gradient(
        lambda t: jacobian_norm(outputs, base, change | {name: t})[0], change[name], gradient[name]
    )
    assert all(torch.equal(seen[n], base[n]) for n in base)


def test_jacobian_norm_where_nothing_moves() -> None:
    base = {"w": normal(3, 2)}
    value, gradient = jacobian_norm(lambda w: normal(4, 3) @ w["w"], base, {"w": torch.zeros(3, 2).double()})
    assert float(value) == 0
    assert torch.equal(gradient["w"], torch.zeros(3, 2).double())


def test_overlap_of_rows() -> None:
    A, others = normal(3, 6), [normal(2, 6, seed=1), normal(4, 6, seed=2)]
    value, gradient = overlap(A, others)
    exact = sum(abs(float(a @ b)) for other in others for b in other for a in A)
    torch.testing.assert_close(float(value), exact)
    assert_is_gradient(lambda a: overlap(a, others)[0], A, gradient)
    basis = torch.linalg.qr(normal(6, 6, seed=3)).Q
    assert float(overlap(basis[:2], [basis[2:5]])[0]) < 1e-12
