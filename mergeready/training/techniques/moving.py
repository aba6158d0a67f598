from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mergeready.weights.shards import forget_pass, reshard


@contextmanager
def moved(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, tensors of a model hold other values; afterwards their own again, bit for bit, whatever happened.

    Args:
        model: The model, whose FSDP2 modules are told to let go of what they gathered.
        pairs: A local tensor and its values; one pair is written before the next is asked for.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    reshard(model)
    try:
        with torch.no_grad():
            for target, values in pairs:
                kept.append((target, target.clone()))
                target.copy_(values)
        yield
    except BaseException:
        forget_pass(model)
        raise
    finally:
        if kept:
            reshard(model)
        with torch.no_grad():
            for target, own in reversed(kept):
                target.copy_(own)
