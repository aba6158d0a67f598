from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    A step that a gradient scaler skips calls neither.

    Args:
        optimizer: The optimizer, unwrapped.
        factor: What the learning rate of every group is multiplied with during the update; it is put back afterwards,
            so that schedulers never see it.
        after: Called after the update, before the learning rate is put back.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float], after: Callable[[], None]) -> None:
        self._optimizer, self._factor, self._after = optimizer, factor, after
        self._depth = 0
        self._rates: list[Any] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._enter()),
            optimizer.register_step_post_hook(lambda *_: self._leave()),
        ]

    def remove(self) -> None:
        """Stop calling."""
        for handle in self._handles:
            handle.remove()

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        factor = self._factor()
        if factor != 1.0:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._after()
        if self._rates is not None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None
