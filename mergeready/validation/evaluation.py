"""How an expert's behaviour is looked at: a model to put weights into, and what to measure on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.merging.evaluation import Evaluate
from mergeready.targets import find_target

OWN = "own"
"""What the expert's own task is called."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model of the base's architecture, and evaluations on held-out data.

    Attributes:
        model: Weights are put into it and taken out again; afterwards it is as it was, bit for bit.
        own: Evaluates the expert's own task.
        others: Evaluations of peers' tasks, by name.
        metric: Which of the returned metrics; None where there is only one.
        greater_is_better: Direction of the metric; by its name where it is None.
        outputs: Logits of a model on neutral inputs, shape (n, classes), to see what else the expert changed.
        unfolded: Makes the adapted model as its own library runs it, to compare with the folded weights.
    """

    model: nn.Module
    own: Evaluate
    others: Mapping[str, Evaluate] | None = None
    metric: str | None = None
    greater_is_better: bool | None = None
    outputs: Callable[[nn.Module], Tensor] | None = None
    unfolded: Callable[[], nn.Module] | None = None

    @property
    def tasks(self) -> dict[str, Evaluate]:
        """Every evaluation, the own one first, which is called ``own``."""
        return {OWN: self.own, **(self.others or {})}


def load_evaluation(target: str, base: object) -> Evaluation:
    """Call ``module:function`` with the base's folder or id; it returns an ``Evaluation``.

    Raises:
        OptionError: If there is no such function, or it returns something else.
    """
    made = find_target(target, "eval")(base)
    if not isinstance(made, Evaluation):
        raise OptionError(f"{target} returned a {type(made).__name__}, not an Evaluation.")
    return made
