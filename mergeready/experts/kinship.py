from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice

import torch

from mergeready.errors import BaseMismatchError
from mergeready.experts.identity import sampled
from mergeready.weights.source import WeightSource

MIN_COSINE = 0.5
MAX_ROUNDING = 0.01
_BATCH = 1024  # tensors whose samples are multiplied at once


def require_kinship(expert: WeightSource, base: WeightSource, names: Mapping[str, str]) -> None:
    """Raise if a full model does not look fine-tuned from a base.

    Compares sampled matrix entries: fine-tuning leaves weights nearly parallel to where they started (cosine
    above 0.9), while another initialisation or another pretraining of the same shapes is orthogonal to it.

    Args:
        expert: The model.
        base: The base.
        names: Base name to the model's name.

    Raises:
        BaseMismatchError: If the cosine of all samples together is below 0.5.
    """
    # Norms and biases start near one and zero in every model; only matrices tell models apart.
    matrices = {theirs: own for theirs, own in names.items() if len(base.infos[theirs].shape) >= 2}
    dot, own, theirs, _ = _sampled_products(expert, base, matrices.items())
    scale = math.sqrt(own * theirs)
    if scale > 0 and dot / scale < MIN_COSINE:
        raise BaseMismatchError(
            f"{expert.label} does not descend from {base.label}: their weights have cosine {dot / scale:.2f}, "
            "where fine-tuning keeps it near 1. Name the base it was trained from."
        )


def require_frozen_equal(model: WeightSource, base: WeightSource, names: Mapping[str, str]) -> None:
    """Raise if parameters that are not trained differ from the base by more than rounding to bf16 does.

    Args:
        model: The model in training.
        base: The base.
        names: Base name to the model's name, frozen parameters only.

    Raises:
        BaseMismatchError: If one differs.
    """
    for base_name, own_name in names.items():
        _, _, theirs, difference = _sampled_products(model, base, [(base_name, own_name)])
        if not difference <= MAX_ROUNDING**2 * max(theirs, 1e-12):  # NaN counts as different
            raise BaseMismatchError(
                f"{own_name} is frozen in {model.label}, yet differs from {base.label}. "
                "Name the base that this model was loaded from."
            )


def _sampled_products(
    model: WeightSource, base: WeightSource, names: Iterable[tuple[str, str]]
) -> tuple[float, float, float, float]:
    """⟨m, b⟩, ‖m‖², ‖b‖² and ‖m − b‖² over sampled entries."""
    sums = torch.zeros(4, dtype=torch.float64)
    pairs = iter(names)
    while batch := list(islice(pairs, _BATCH)):
        m = torch.cat([part.double() for _, own_name in batch for part in sampled(model, own_name)])
        b = torch.cat([part.double() for base_name, _ in batch for part in sampled(base, base_name)])
        sums += torch.stack([m @ b, m @ m, b @ b, (m - b) @ (m - b)])
    dot, own, theirs, difference = sums.tolist()
    return dot, own, theirs, difference
