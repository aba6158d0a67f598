from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mergeready.errors import UnsupportedError
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.train_only import Keep, train_only


@register
@dataclass(frozen=True, kw_only=True)
class TrainOnly(Technique):
    """Train only some parameters; see :func:`mergeready.training.train_only.train_only` for filters and evidence.

    The optimizer may have been made already: parameters without gradients are passed over. Under DDP, call
    ``mergeready.train_only(model, …)`` before the model is wrapped instead.

    Attributes:
        keep: ``attention``, ``linear``, ``last:3`` or ``re:pattern``.
        also: A regular expression for names that train besides, such as a fresh head.

    Example:
        >>> TrainOnly(keep="last:2", also="classifier").keep
        'last:2'
    """

    name: ClassVar[str] = "train_only"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.TRAINABLE})

    keep: Keep = "attention"
    also: str | None = None

    def prepare(self, model: nn.Module, *, step: int) -> None:
        require_not_wrapped(model, self.name, "mergeready.train_only(model, …)")
        train_only(model, self.keep, also=self.also)

    def begin(self, run: TechniqueRun) -> Running:
        return Running()


def require_not_wrapped(model: nn.Module, what: str, instead: str) -> None:
    """Raise if DDP counted already which parameters train.

    Raises:
        UnsupportedError: If so.
    """
    if type(model).__name__ == "DistributedDataParallel":
        raise UnsupportedError(
            f"{what} changes which parameters train, which DDP has counted already: call `{instead}` before the model "
            "is wrapped, and leave the technique out."
        )
