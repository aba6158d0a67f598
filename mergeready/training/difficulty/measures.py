from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.errors import OptionError, UnsupportedError

IGNORED = -100
"""The label of positions that do not count."""


@dataclass(frozen=True, eq=False)
class ExampleMeasures:
    """What one forward pass says of each example; fp32 (float64 for float64 logits), one number an example.

    Attributes:
        loss: Cross-entropy in nats; of sequences the mean over positions that count.
        el2n: ‖softmax(z) − onehot(y)‖₂, in [0, √2]; of sequences the mean over positions.
        confidence: Probability of the true class; of sequences the mean over positions.
        correct: Whether the true class is the likeliest; of sequences whether it is everywhere.
    """

    loss: Tensor
    el2n: Tensor
    confidence: Tensor
    correct: Tensor


@torch.no_grad()
def example_measures(logits: Tensor, labels: Tensor, *, shift: bool = False) -> ExampleMeasures:
    """Loss, EL2N and confidence of each example of a batch, from its logits.

    EL2N is the norm of the loss gradient with respect to the logits: Paul et al., "Deep Learning on a Data Diet"
    (arXiv 2107.07075), definition 2.2, there averaged over several short trainings. *Cost*: one softmax; of sequences
    one example at a time, so that memory is that of one.

    Args:
        logits: (examples, classes), or (examples, positions, classes) of a language model or tagger.
        labels: Class indices, (examples,) or (examples, positions) with -100 where a position does not count.
        shift: Whether position t predicts label t + 1, as causal language models do.

    Returns:
        One number an example. NaN, and not correct, where none of an example's positions counts.

    Raises:
        UnsupportedError: If the labels are no class indices, as in regression, or there is but one output.
        OptionError: If shapes do not fit.

    Example:
        >>> found = example_measures(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> found.el2n.round(decimals=3), found.correct
        (tensor([0.7070, 1.4140]), tensor([ True, False]))
    """
    if labels.is_floating_point() or logits.shape[-1] < 2:
        raise UnsupportedError(
            "difficulty needs class indices as labels and one logit a class; regression and several labels an example "
            "have no EL2N."
        )
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1]:
        raise OptionError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: (examples, classes) and "
            "(examples,), or (examples, positions, classes) and (examples, positions)."
        )
    logits, labels = logits.detach(), labels.to(logits.device)
    if logits.ndim == 2:
        return _of_rows(logits, labels)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = [
        _of_rows(rows[kept], own[kept])
        for rows, own in zip(logits, labels, strict=True)
        for kept in [own != IGNORED]
    ]
    return ExampleMeasures(
        loss=torch.stack([one.loss.mean() for one in found]),
        el2n=torch.stack([one.el2n.mean() for one in found]),
        confidence=torch.stack([one.confidence.mean() for one in found]),
        correct=torch.stack([one.correct.all() & bool(len(one.correct)) for one in found]),
    )


def _of_rows(logits: Tensor, labels: Tensor) -> ExampleMeasures:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = labels != IGNORED
    target = labels.where(counted, 0)
    log_probabilities = wide.log_softmax(-1)
    true = log_probabilities.gather(-1, target[:, None])[:, 0]
    missing = torch.full_like(true, torch.nan)
    # p − y in place: over a vocabulary, each tensor of this size counts.
    error = log_probabilities.exp_()
    error.scatter_add_(-1, target[:, None], -torch.ones_like(true)[:, None])
    return ExampleMeasures(
        loss=torch.where(counted, -true, missing),
        el2n=torch.where(counted, torch.linalg.vector_norm(error, dim=-1), missing),
        confidence=torch.where(counted, true.exp(), missing),
        correct=(wide.argmax(-1) == target) & counted,
    )
