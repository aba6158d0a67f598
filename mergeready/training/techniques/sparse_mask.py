from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from mergeready.errors import HistoryError, MismatchError, OptionError, UnsupportedError, listing
from mergeready.training.batches import Batches, Forward, require_repeatable
from mergeready.training.lowest_fisher import lowest_fisher
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.same import require_same
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.techniques.trained import Whole
from mergeready.weights.module import module_parameters
from mergeready.weights.shards import local, placed_like, whole


@register
@dataclass(frozen=True, kw_only=True)
class SparseMask(Technique):
    """Train only the weights that predictions depend on least (TaLoS); all others stay at the base, bit for bit.

    Masks are made once, at the base: :func:`mergeready.training.lowest_fisher.lowest_fisher`. Gradients outside are
    zeroed before clipping; after the update, weights outside are put back, as weight decay moves them too. Parameters
    that the base lacks, such as the task's head, train freely. Iurada et al. (arXiv 2504.02620), who train a tenth;
    their figures for eight ViT-B/32 experts are 77.4 in a reproduction, against 70.4 plain.

    A model that is sharded cannot be scored example by example: make its masks before, on one process, and pass them.

    Cost: ``rounds`` × examples backward passes at the start; a product and a copy a step; a byte a weight.

    Attributes:
        batches: Inputs of this run's task, a few hundred examples, the same on every rank; labels are not used. Not
            needed with ``masks``.
        masks: What ``lowest_fisher`` gave for the same base, or a safetensors file of it, by the model's names;
            parameters that it does not name are frozen.
        share: Share of the weights that trains, in (0, 1).
        rounds: Rounds of scoring.
        forward: Gives the logits of a batch.
        seed: Seed of the labels that are drawn.

    Example:
        >>> SparseMask(batches=[torch.ones(4, 3)]).share
        0.1
    """

    name: ClassVar[str] = "sparse_mask"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.GRADIENTS, Touch.WEIGHTS})

    batches: Batches | None = None
    masks: Mapping[str, Tensor] | str | Path | None = None
    share: float = 0.1
    rounds: int = 4
    forward: Forward | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(f"`share` must be between 0 and 1, not {self.share}.")
        if self.rounds < 1:
            raise OptionError(f"`rounds` must be at least 1, not {self.rounds}.")
        if (self.batches is None) == (self.masks is None):
            raise OptionError("sparse_mask needs either `batches` to make masks from, or `masks`.")
        if self.batches is not None:
            require_repeatable(self.batches)

    def begin(self, run: TechniqueRun) -> Running:
        if run.live.is_peft:
            raise UnsupportedError("sparse_mask is for models that are trained whole, not for adapters.")
        weights = [weight for weight in run.weights.values() if isinstance(weight, Whole)]
        if run.step:
            return _Masked(weights, None)  # made at the base; the loaded state has it
        own = {id(parameter): name for name, parameter in module_parameters(run.live.model).items()}
        names = {own[id(weight.place)]: weight for weight in weights}
        found = self._given(names) if self.batches is None else self._made(run, self.batches, names)
        require_same(run.ranks, "sparse_mask's masks", found)
        return _Masked(weights, {names[name].name: mask for name, mask in found.items() if name in names})

    def _given(self, names: Mapping[str, Whole]) -> Mapping[str, Tensor]:
        found = load_file(self.masks) if isinstance(self.masks, str | Path) else self.masks or {}
        problems = [
            f"{name} {tuple(found[name].shape)} for {weight.block.shape}"
            for name, weight in names.items()
            if name in found and tuple(found[name].shape) != weight.block.shape
        ]
        if problems or not found.keys() & names.keys():
            what = listing(problems, 4) or "none is of a parameter that trains"
            raise MismatchError(f"`masks` of sparse_mask are not of this model: {what}.")
        return found

    def _made(self, run: TechniqueRun, batches: Batches, names: Mapping[str, Whole]) -> Mapping[str, Tensor]:
        if run.live.is_sharded:
            raise UnsupportedError(
                "sparse_mask scores weights example by example, which a sharded model cannot. Make masks on one "
                "process, `mergeready.lowest_fisher(model, batches)`, and pass them as `masks`."
            )
        return lowest_fisher(
            run.live.model,
            batches,
            share=self.share,
            rounds=self.rounds,
            forward=self.forward,
            seed=self.seed,
            among=names,
        )


class _Masked(Running):
    def __init__(self, weights: list[Whole], masks: Mapping[str, Tensor] | None) -> None:
        self._weights, self._share = weights, 0.0
        self._masks = None if masks is None else self._placed(masks)

    def edit_gradients(self, step: int) -> None:
        for weight, mask in self._pairs():
            gradient = weight.place.grad
            if gradient is not None:
                local(gradient).mul_(mask)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, mask in self._pairs():
            weight.target.copy_(torch.where(mask, weight.target, weight.base.to(weight.target.dtype)))

    def scalars(self) -> Mapping[str, float]:
        return {"share": self._share}

    def tensors(self) -> dict[str, Tensor]:
        # As bytes, since not every backend gathers booleans.
        return {
            weight.name: whole(placed_like(weight.place, mask.byte())).bool().cpu()
            for weight, mask in self._pairs()
        }

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._masks = self._placed(tensors)

    def _placed(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A mask for every weight, where it is; weights that no mask names are frozen."""
        chosen = sum(int(masks[weight.name].sum()) for weight in self._weights if weight.name in masks)
        self._share = chosen / max(sum(math.prod(weight.block.shape) for weight in self._weights), 1)
        return {
            weight.name: weight.block.of(masks[weight.name]).to(weight.target.device, torch.bool)
            if weight.name in masks
            else torch.zeros(weight.block.sizes, dtype=torch.bool, device=weight.target.device)
            for weight in self._weights
        }

    def _pairs(self) -> list[tuple[Whole, Tensor]]:
        if self._masks is None:
            raise HistoryError("sparse_mask is resumed without its masks: load the monitor's saved state.")
        return [(weight, self._masks[weight.name]) for weight in self._weights]
