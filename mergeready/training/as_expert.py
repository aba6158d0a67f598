from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from mergeready.experts.base import Base
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.live import is_peft
from mergeready.experts.open import pair_with_base
from mergeready.merging.in_place import MergedInPlace
from mergeready.weights.guard import untouched
from mergeready.weights.module import ModuleSource, module_parameters, unwrap
from mergeready.weights.open import WeightsLike


@dataclass(frozen=True)
class SeenAsExpert:
    """A model that computes with plain weights, and which they are.

    Attributes:
        tensors: Base parameter name to the tensor that the model computes with; own names where no base was given.
        base: Identity of the base, if one is known.
    """

    tensors: Mapping[str, Tensor]
    base: BaseIdentity | None


@contextmanager
def as_expert(model: nn.Module, base: WeightsLike | Base | None) -> Iterator[SeenAsExpert]:
    """In the block the model computes as in evaluation, an adapter folded into its weights; then all is as before.

    With the adapter folded in, derivatives and inputs of each weight are those of the effective weight, whatever kind
    of adapter it was.

    Args:
        model: The expert.
        base: Gives parameters their names in the base. None keeps the model's own.

    Raises:
        MergeReadyError: As ``LiveExpert`` does for adapters, and ``open_expert`` for other models.
    """
    if is_peft(unwrap(model)):
        with MergedInPlace(model, base, []) as merged:
            merged.live.model.eval()
            yield SeenAsExpert(merged.live.targets, merged.live.base.identity)
        return
    tensors: Mapping[str, Tensor] = module_parameters(model)
    identity = None
    if base is not None:
        base = Base.open(base)
        names, _, _ = pair_with_base(ModuleSource(model), base, strict=False)
        tensors = {name: tensors[own] for name, own in names.items() if own in tensors}
        identity = base.identity
    with untouched(unwrap(model), {}):
        model.eval()
        yield SeenAsExpert(tensors, identity)
