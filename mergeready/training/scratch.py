from __future__ import annotations

import copy

from torch import nn

from mergeready.experts.base import Base
from mergeready.experts.live import LiveExpert
from mergeready.weights.module import unwrap
from mergeready.weights.open import WeightsLike


def scratch(model: nn.Module, base: WeightsLike | Base) -> LiveExpert:
    """A copy of a model, in evaluation mode, whose weights may be overwritten.

    A copy, and not the model with its weights put back later: base and experts may be live models too, this one among
    them, and are read while its weights are being replaced.

    Raises:
        MergeReadyError: As ``LiveExpert`` does.
    """
    base = Base.open(base)
    copied = copy.deepcopy(unwrap(model)).eval()
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # what is frozen must equal the base; here nothing has to
    return LiveExpert(copied, base)
