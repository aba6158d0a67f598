"""Optimizers that train other weights than they evaluate, as schedule-free ones do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mergeready.errors import OptionError
from mergeready.training.techniques.hooks import unwrapped
from mergeready.weights.shards import local


def turning(optimizers: Iterable[Any]) -> list[Any]:
    """Those of a run's optimizers that turn the weights in training into those to evaluate, and back.

    They have methods ``eval`` and ``train`` for that, as those of the schedulefree package.

    Args:
        optimizers: The optimizers; wrappers are looked through.

    >>> turning([torch.optim.SGD([torch.zeros(1)])])
    []
    """
    found = []
    for optimizer in optimizers:
        try:
            inner: Any = unwrapped(optimizer)
        except OptionError:  # no torch optimizer, which may turn weights all the same
            inner = optimizer
        if all(callable(getattr(inner, method, None)) for method in ("eval", "train")):
            found.append(inner)
    return found


@contextmanager
def turned(optimizers: Iterable[Any]) -> Iterator[None]:
    """Inside, a model holds the weights to evaluate, and afterwards those in training, bit for bit.

    Evaluations that turn weights themselves are kept from it: merged weights may be in the model, of which the
    optimizer knows nothing.

    Args:
        optimizers: What :func:`turning` gave.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(_turned(optimizer))
        yield


@contextmanager
def _turned(optimizer: Any) -> Iterator[None]:
    held = [local(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    own, mode = [tensor.clone() for tensor in held], _mode(optimizer)
    optimizer.eval()
    was_training = _mode(optimizer) != mode
    optimizer.eval = optimizer.train = lambda *_, **__: None
    try:
        yield
    finally:
        del optimizer.eval, optimizer.train
        if was_training:
            optimizer.train()
            with torch.no_grad():
                for tensor, value in zip(held, own, strict=True):  # turning there and back rounds
                    tensor.copy_(value)


def _mode(optimizer: Any) -> list[bool]:
    """The switches of an optimizer; which of them says whether it is training has many names."""
    places = [*optimizer.param_groups, vars(optimizer)]
    return [value for place in places for value in place.values() if isinstance(value, bool)]
