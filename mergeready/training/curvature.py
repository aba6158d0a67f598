from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready.errors import NonFiniteError, OptionError, listing
from mergeready.experts.base import Base
from mergeready.merging.information import Collected
from mergeready.training.as_expert import as_expert
from mergeready.training.batches import (
    Batches,
    Forward,
    examples_of,
    forward_logits,
    labels_of,
    on_device_of,
    positions,
)
from mergeready.weights.open import WeightsLike

Labels: TypeAlias = Literal["sampled", "expected", "true"]
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""The negative log-likelihood of one example, given as a batch of one."""


def fisher_information(
    model: nn.Module,
    batches: Batches,
    *,
    base: WeightsLike | Base | None = None,
    labels: Labels = "sampled",
    loss: Loss | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Collected:
    """The diagonal of an expert's Fisher information on its own data, for the method ``fisher``.

    ``F = mean over examples x of E over labels y ~ p(y | x) of (∂ log p(y | x) / ∂θ)²``, by element. Matena and Raffel
    (arXiv 2111.09832), section 3. Gradients are squared example by example: squaring those of whole batches, as is
    often done, gives something else. A few hundred examples suffice; each costs one backward pass.

    Args:
        model: The expert, plain or with a PEFT adapter. It is put into evaluation mode for the time being; nothing
            of it changes, gradients and random state included.
        batches: Inputs of its task.
        base: The base, which gives parameters their names and is recorded with the result.
        labels: Where labels come from: ``sampled``, one draw an example (and position) from the model; ``expected``,
            the expectation over all classes, which costs one backward pass a class; ``true``, those in the batches,
            which gives the empirical Fisher.
        loss: The negative log-likelihood of one example, instead of ``labels`` and ``forward``: for regression,
            and for true labels of language models.
        forward: Gives the logits of a batch; by default ``model(**batch).logits``, or ``model(batch[0])`` for
            tuples. Logits of several positions count each position that is not padding.
        seed: Seed of the draws.

    Returns:
        fp32 values of every parameter, zero where none of the examples reached it. Merge methods take it as it is,
        or the file that its ``save`` writes.

    Raises:
        OptionError: If ``labels`` is unknown or does not fit the model; or there are no batches.
        NonFiniteError: If gradients are not finite.
        MergeReadyError: If the model does not fit the base.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> fisher = fisher_information(model, [torch.tensor([[1.0], [3.0]])], labels="expected")
        >>> fisher.read("weight")  # p(1 − p) · mean of x²
        tensor([[1.2500],
                [1.2500]])
    """
    if labels not in get_args(Labels):
        raise OptionError(f"`labels` must be sampled, expected or true, not {labels!r}.")
    generator = torch.Generator().manual_seed(seed)
    with as_expert(model, base) as seen, torch.enable_grad():
        tensors = {name: t.requires_grad_() for name, t in seen.tensors.items() if t.is_floating_point()}
        sums = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in tensors.items()}
        count = 0
        for batch in on_device_of(model, batches):
            for example in examples_of(batch):
                if loss is not None:
                    terms = iter([(1.0, loss(model, example))])
                else:
                    terms = _terms((forward or forward_logits)(model, example), example, labels, generator)
                _add_squares(sums, tensors, terms)
                count += 1
        result = {name: total.div_(count).cpu() for name, total in sums.items()}
        identity = seen.base
    _require_finite(result)
    facts = {"examples": count, "labels": labels if loss is None else "loss", "seed": seed}
    return Collected(result, "fisher", identity, facts)


def _terms(
    logits: Tensor, example: Any, labels: Labels, generator: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """Probabilities, and the negative log-likelihoods whose squared gradients they weigh."""
    if logits.shape[-1] < 2:
        raise OptionError(
            "the model has one output, so its likelihood is not known: pass `loss`, such as half the squared error."
        )
    rows = positions(logits, example).float()
    if labels == "sampled":
        drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
        yield 1.0, cross_entropy(rows, drawn[:, 0].to(rows.device), reduction="sum")
        return
    if logits.ndim > 2:
        raise OptionError(f"the model has logits for many positions: labels={labels!r} needs `loss` there.")
    if labels == "true":
        yield 1.0, cross_entropy(rows, labels_of(example).reshape(-1), reduction="sum")
        return
    log_probabilities = rows.log_softmax(-1)[0]
    for value in log_probabilities:
        yield float(value.detach().exp()), -value


def _add_squares(
    sums: dict[str, Tensor], tensors: dict[str, Tensor], terms: Iterator[tuple[float, Tensor]]
) -> None:
    for probability, value in terms:
        gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, retain_graph=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.float().square_(), alpha=probability)


def _require_finite(values: dict[str, Tensor]) -> None:
    broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise NonFiniteError(
            f"gradients are NaN or infinite in {len(broken)} parameters: {listing(broken)}. The expert diverged, or "
            "its dtype is too narrow: collect in float32."
        )
