from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mergeready.errors import OptionError


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a framework's wrapper.

    Raises:
        OptionError: If there is none.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise OptionError(f"{type(optimizer).__name__} is no torch optimizer and wraps none.")
    found: Optimizer = inner
    return found


class StepHooks:
    """Calls before and after each update of an optimizer, once each, also where a subclass calls its parent's step.

    A step that a gradient scaler skips calls neither; after one that raises, the next is seen as any other.

    Args:
        optimizer: The optimizer, unwrapped.
        factor: What the learning rate of every group is multiplied with during the update; it is put back afterwards,
            so that schedulers never see it.
        after: Called after the update, before the learning rate is put back.
        model: The model that is steered; see :func:`take_off`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[], float],
        after: Callable[[], None],
        model: nn.Module | None = None,
    ) -> None:
        self.model = model
        self._optimizer, self._factor, self._after = optimizer, factor, after
        self._depth = 0
        self._outermost: FrameType | None = None
        self._rates: list[Any] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def remove(self) -> None:
        """Stop calling."""
        self._end()
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        caller = sys._getframe(1)
        if self._depth and not _is_running(self._outermost, caller):
            self._end()  # the step before raised
        self._depth += 1
        if self._depth > 1:
            return
        self._outermost = caller
        factor = self._factor()
        if factor != 1.0:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _leave(self, *_: Any) -> None:
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            self._after()
        finally:
            self._end()

    def _end(self) -> None:
        self._depth, self._outermost = 0, None
        if self._rates is not None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None


def take_off(optimizer: Any, model: nn.Module) -> None:
    """Take off what an earlier run of a model, that did not come to its end, left on its optimizer.

    Args:
        optimizer: The optimizer; wrappers are looked through.
        model: The model, unwrapped. Others may be steered through the same optimizer.
    """
    try:
        inner: Any = unwrapped(optimizer)
    except OptionError:
        return  # nothing can have been put on it
    for hook in list(inner._optimizer_step_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepHooks) and owner.model is model:
            owner.remove()


def _is_running(frame: FrameType | None, inside: FrameType | None) -> bool:
    """Whether a frame is one of those that led to another."""
    while inside is not None:
        if inside is frame:
            return True
        inside = inside.f_back
    return False
