from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch.optim import Optimizer

from mergeready.errors import OptionError
from mergeready.experts.live import LiveExpert
from mergeready.training.history import History
from mergeready.training.peers import OpenPeer, SketchedPeer
from mergeready.training.techniques.trained import Trained, trained_weights
from mergeready.weights.ranks import Ranks


@dataclass
class TechniqueRun:
    """What a technique is given to work with in one run.

    Attributes:
        live: The model seen as an expert.
        optimizer: The run's optimizer, unwrapped; None where the shell was given none.
        peers: Peers that have weights.
        sketched: Peers known by fingerprint.
        ranks: The processes of the run.
        step: Optimizer steps taken before it begins.
        total_steps: Optimizer steps that the run will take, if known.
        history: The run's history, which grows.
        probes: Whether the run probes at all.
    """

    live: LiveExpert
    optimizer: Optimizer | None = None
    peers: Sequence[OpenPeer] = ()
    sketched: Sequence[SketchedPeer] = ()
    ranks: Ranks = field(default_factory=Ranks.alone)
    step: int = 0
    total_steps: int | None = None
    history: Callable[[], History] = History
    probes: bool = False

    @cached_property
    def weights(self) -> dict[str, Trained]:
        """What trains, or has trained in this run, by base parameter name.

        Raises:
            UnsupportedError: For adapters that are not plain LoRA.
            OptionError: If nothing of the base trains.
        """
        found = trained_weights(self.live)
        if not found:
            raise OptionError(
                "no parameter that the base has trains here, so there is no task vector for techniques to act on: "
                "freeze less, or leave `techniques` out."
            )
        return found

    def learning_rates(self) -> Iterator[float]:
        """The learning rate of each parameter group at this moment."""
        for group in self.require_optimizer("the learning rate").param_groups:
            yield float(group["lr"])

    def require_optimizer(self, what: str) -> Optimizer:
        """The optimizer.

        Raises:
            OptionError: If there is none.
        """
        if self.optimizer is None:
            raise OptionError(
                f"a technique that touches {what} needs one optimizer: `prepare(..., optimizer=optimizer)`."
            )
        return self.optimizer
