"""Masks of the weights that a model's predictions depend on least."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.live import is_peft
from mergeready.training.batches import Batches, Forward, require_repeatable
from mergeready.training.curvature import fisher_information
from mergeready.weights.guard import untouched
from mergeready.weights.module import module_parameters, unwrap

_DAMPING = (
    0.1  # on weights that are out already, as TaLoS's code has it: zero would cut what flows through them
)


def lowest_fisher(
    model: nn.Module,
    batches: Batches,
    *,
    share: float = 0.1,
    rounds: int = 4,
    forward: Forward | None = None,
    seed: int = 0,
    among: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Masks of the share of weights with the smallest diagonal Fisher information: those that may train.

    TaLoS, Iurada et al. (arXiv 2504.02620): what hardly moves predictions on the task hardly moves others', so experts
    that train only there interfere less. Labels are drawn from the model, gradients squared by example. In round r of
    R the share ``share^(r/R)`` stays in; weights that are out count a tenth while the next round is scored. Embeddings
    take no part and stay frozen: rows of words that do not occur would score lowest. The authors' code scores gradients
    of logits where the Fisher information, here and in the paper, has those of log-probabilities.

    Cost: rounds × examples backward passes, once.

    Args:
        model: The model at its base weights, trained whole.
        batches: Inputs of the task, without labels; a few hundred examples.
        share: Share of the weights that trains, in (0, 1).
        rounds: How many rounds.
        forward: Gives the logits of a batch.
        seed: Seed of the draws.
        among: Names of the parameters that take part; all by default.

    Returns:
        Boolean masks on the CPU by parameter name; all others are to be frozen.

    Raises:
        OptionError: If share or rounds are out of range, or batches can be read once only.
        UnsupportedError: If the model has an adapter.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> masks = lowest_fisher(model, [torch.tensor([[1.0, 0.1]])], share=0.5, rounds=1)
        >>> masks["weight"]
        tensor([[False,  True],
                [False,  True]])
    """
    if not 0 < share < 1:
        raise OptionError(f"`share` must be between 0 and 1, not {share}.")
    if rounds < 1:
        raise OptionError(f"`rounds` must be at least 1, not {rounds}.")
    if is_peft(unwrap(model)):
        raise UnsupportedError(
            "masks are for models that are trained whole; a LoRA adapter is low-rank already."
        )
    require_repeatable(batches)
    chosen = _maskable(model)
    parameters = {name: p for name, p in chosen.items() if among is None or name in among}
    if not parameters:
        raise OptionError(
            "there is no parameter to mask: all are frozen, embeddings, or not among those named."
        )
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    with untouched(unwrap(model), parameters) as kept:
        for done in range(1, rounds + 1):
            fisher = fisher_information(model, batches, forward=forward, seed=seed + done - 1)
            scores = {
                name: fisher.read(name).masked_fill(~mask, float("inf")) for name, mask in masks.items()
            }
            masks = lowest(scores, share ** (done / rounds))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    own = kept[name].to(parameter.device)
                    parameter.copy_(torch.where(masks[name].to(parameter.device), own, _DAMPING * own))
    return masks


def lowest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the lowest scores over all tensors together, exactly ``round(share · n)`` of them; ties go to the first.

    >>> lowest({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 0.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    count = max(round(share * len(flat)), 1)
    border = flat.kthvalue(count).values
    chosen = flat < border
    ties = (flat == border).nonzero()[:, 0]
    chosen[ties[: count - int(chosen.sum())]] = True
    pieces = torch.split(chosen, [score.numel() for score in scores.values()])
    return {
        name: piece.reshape(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)
    }


def _maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    return {
        name: parameter
        for name, parameter in module_parameters(model).items()
        if parameter.requires_grad and id(parameter) not in embeddings
    }
