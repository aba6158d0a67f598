"""The Fabric shell: the loop's object, with Fabric's loggers and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.wrappers import is_wrapped
from numpy import uint8
from numpy.typing import NDArray
from torch import nn

from mergeready.training import loop
from mergeready.training.options import MonitorOptions, evaluating_inside
from mergeready.validation.share import with_sharing


class MergeReadyLoop(loop.MergeReadyLoop):
    """Watch how well the model of a Fabric loop merges, steer it, and stop before merging suffers.

    As :class:`mergeready.MergeReadyLoop`, and: scalars and images go to Fabric's loggers; all processes stop together;
    the object itself can stand in the state that ``fabric.save`` and ``fabric.load`` take. Call :meth:`prepare`
    after ``fabric.setup`` and ``fabric.load``. Every process makes the same calls.

    Args:
        fabric: The run's Fabric.
        folder: Where history, picks and summary go; one folder a run.
        **options: ``base``, ``peers``, ``probe``, ``stop``, ``on_stop``, ``measure``, ``picks`` and
            ``techniques``, as :class:`~mergeready.training.monitor.Monitor` takes them. A probe needs its ``evaluate``.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from mergeready import NormBudget, Schedule
        >>> fabric, model = Fabric(accelerator="cpu"), torch.nn.Linear(3, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> options = {"measure": Schedule(every=2), "stop": NormBudget(max_norm=0.5)}
        >>> monitor = MergeReadyLoop(fabric, mkdtemp(), **options)
        >>> monitor.prepare(model)
        >>> while not monitor.should_stop:
        ...     optimizer.zero_grad()
        ...     fabric.backward(model(torch.ones(1, 3)).mean())
        ...     optimizer.step()
        ...     logged = monitor.step()
        >>> summary = monitor.finish()
        >>> monitor.steps
        4
    """

    def __init__(self, fabric: Fabric, folder: str | Path, **options: Unpack[MonitorOptions]) -> None:
        super().__init__(folder, **with_sharing(evaluating_inside(options, fabric.autocast)))
        self.fabric = fabric

    def prepare(
        self,
        model: nn.Module,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        processor: Any = None,
        optimizer: Any = None,
        scaler: Any = None,
    ) -> None:
        plain: Any = model
        inner: nn.Module = plain.module if is_wrapped(plain) else model
        super().prepare(
            inner,
            step=step,
            total_steps=total_steps,
            processor=processor,
            optimizer=optimizer,
            scaler=scaler or getattr(self.fabric.strategy.precision, "scaler", None),
        )

    def _any_rank(self, stop: bool) -> bool:
        return bool(self.fabric.strategy.reduce_boolean_decision(stop, all=False))

    def _log(self, scalars: Mapping[str, float]) -> None:
        self.fabric.log_dict(scalars, step=self.steps)

    def _log_images(self) -> None:
        log_images(self.fabric.loggers, self.images, self.steps)


def log_images(loggers: Iterable[Any], images: Callable[[], Mapping[str, NDArray[uint8]]], step: int) -> None:
    """Send images to those of Lightning's loggers that take some; they are not drawn if none does."""
    takers = [x for x in loggers if isinstance(x, TensorBoardLogger) or hasattr(x, "log_image")]
    if takers and rank_zero_only.rank == 0:
        for name, image in images().items():
            for logger in takers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, image, step, dataformats="HWC")
                else:
                    logger.log_image(name, [image], step=step)
