"""Frozen heads, so that experts of different tasks share the encoder and nothing else.

Text: the label phrases, embedded by the pretrained encoder, are the head; no training. Vision: a logistic
regression on frozen features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LOGIT_SCALE = 20.0  # turns cosines into logits; close to what sentence encoders are trained with


def pooled(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    """Unit-length mean of the last hidden states over the tokens that are not padding, ``(n, hidden)``."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def zero_shot_head(encoder_folder: Path, label_texts: tuple[str, ...]) -> Tensor:
    """Embed one phrase a class.

    Args:
        encoder_folder: a folder that ``AutoModel.from_pretrained`` loads.
        label_texts: one English phrase a class.

    Returns:
        Unit-length rows ``(classes, hidden)``, float32, without gradient.

    Raises:
        ValueError: fewer than two phrases, or two equal ones.
    """
    if len(label_texts) < 2 or len(set(label_texts)) != len(label_texts):
        raise ValueError(f"`label_texts` must be at least two different phrases, got {label_texts}")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_folder, local_files_only=True)
    model: PreTrainedModel = AutoModel.from_pretrained(encoder_folder, local_files_only=True)
    tokens = dict(tokenizer(list(label_texts), padding=True, return_tensors="pt"))
    with torch.no_grad():
        return pooled(model.eval(), tokens)


def zero_shot_logits(embeddings: Tensor, head: Tensor) -> Tensor:
    """``20 * cos(text, label)`` from unit-length text embeddings ``(n, hidden)``: ``(n, classes)``."""
    return LOGIT_SCALE * embeddings @ head.T


def linear_probe(
    features: Tensor, labels: Tensor, classes: int, *, regularisation: float = 1e-3
) -> torch.nn.Linear:
    """Fit a multinomial logistic regression on frozen features, to be used as a frozen head.

    Minimises ``mean cross-entropy + regularisation / 2 * |weights|²`` on standardised features; the
    standardisation is folded into the returned layer.

    Args:
        features: ``(n, dim)``.
        labels: class indices ``(n,)``.
        classes: number of classes; classes without an example get a low bias, not an error.
        regularisation: strength of the weight penalty, above 0.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"`features` must be (n, dim) and `labels` (n,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"`labels` must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    features = features.detach().double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(inputs @ weight.T + bias, labels)
        value = value + regularisation / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    layer = torch.nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(weight / std)
        layer.bias.copy_(bias - (weight / std) @ mean)
    return layer.requires_grad_(False)
