"""The accelerate shell: the loop's object, with an Accelerator's checkpoints, trackers and ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from mergeready.errors import HistoryError, OptionError
from mergeready.training import loop
from mergeready.training.options import MonitorOptions
from mergeready.validation.share import with_sharing
from mergeready.weights.atomic import new_file

FOLDER_NAME = "mergeready"
STATE_NAME = "mergeready.json"
TENSORS_NAME = "mergeready_techniques.safetensors"


class MergeReadyLoop(loop.MergeReadyLoop):
    """Watch how well the model of a hand-written accelerate loop merges, steer it, and stop before merging suffers.

    As :class:`mergeready.MergeReadyLoop`, and: scalars and images go to the accelerator's trackers; ``save_state``
    writes the monitor's state beside its other files, as JSON, and ``load_state`` reads it; micro-batches of gradient
    accumulation are not counted; all processes stop together. Make it before ``load_state``, and call
    :meth:`prepare` after ``accelerator.prepare`` and ``load_state``. Every process makes the same calls.

    Args:
        accelerator: The run's accelerator.
        folder: Where history, picks and summary go; ``<project_dir>/mergeready`` by default.
        **options: ``base``, ``peers``, ``probe``, ``stop``, ``on_stop``, ``measure``, ``picks`` and
            ``techniques``, as :class:`~mergeready.training.monitor.Monitor` takes them. A probe needs its ``evaluate``.

    Raises:
        OptionError: If there is neither a folder nor a project folder.

    Example:
        >>> from tempfile import mkdtemp
        >>> from mergeready import NormBudget, Schedule
        >>> accelerator = Accelerator(cpu=True, project_dir=mkdtemp())
        >>> model = torch.nn.Linear(3, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> monitor = MergeReadyLoop(accelerator, measure=Schedule(every=2), stop=NormBudget(max_norm=0.5))
        >>> monitor.prepare(model)
        >>> while not monitor.should_stop:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(model(torch.ones(1, 3)).mean())
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     logged = monitor.step()
        >>> summary = monitor.finish()  # before accelerator.end_training()
        >>> monitor.steps
        4
    """

    def __init__(
        self, accelerator: Accelerator, folder: str | Path | None = None, **options: Unpack[MonitorOptions]
    ) -> None:
        if folder is None and accelerator.project_dir is None:
            raise OptionError(
                "`folder` is needed: the accelerator has no `project_dir` to put its files under."
            )
        super().__init__(folder or Path(accelerator.project_dir) / FOLDER_NAME, **with_sharing(options))
        self.accelerator = accelerator
        self._loaded_without_state: Path | None = None
        # register_for_checkpointing would pickle; hooks leave the format to us.
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

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
        if self._loaded_without_state is not None and step is None:
            raise HistoryError(
                f"{self._loaded_without_state} was saved without a monitor, so `step` is not known: "
                "pass the number of optimizer steps that were taken."
            )
        super().prepare(
            model,
            step=step,
            total_steps=total_steps,
            processor=processor,
            optimizer=self.accelerator._optimizers if optimizer is None else optimizer,
            scaler=scaler or self.accelerator.scaler,
        )

    def passes(self, *, last: bool = True) -> Iterator[None]:
        """As that of every loop; inside ``accelerator.accumulate``, which knows a step's last micro-batch."""
        yield from super().passes(last=last and self.accelerator.sync_gradients)

    def step(self) -> Mapping[str, float]:
        if not self.accelerator.sync_gradients:  # a micro-batch: the optimizer took no step
            return {}
        return super().step()

    def _save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        if not self.monitor.started:
            return
        state = self.state_dict()
        tensors = state.pop("tensors", None)
        if self.accelerator.is_main_process:
            if tensors:
                with new_file(Path(output_dir) / TENSORS_NAME) as temporary:
                    save_file(tensors, temporary)
            with new_file(Path(output_dir) / STATE_NAME) as temporary:
                temporary.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        path = Path(input_dir) / STATE_NAME
        found = self.accelerator.is_main_process and path.exists()
        # All processes take what the main one reads: it alone wrote the file, perhaps on another machine.
        beside = path.with_name(TENSORS_NAME)
        tensors = load_file(beside) if found and beside.is_file() else None
        text, tensors = broadcast_object_list([path.read_text(encoding="utf-8") if found else None, tensors])
        if text is not None:
            self.load_state_dict(json.loads(text) | ({"tensors": tensors} if tensors else {}))
        else:
            self._loaded_without_state = path.parent

    def _any_rank(self, stop: bool) -> bool:
        # Not set_trigger and check_trigger, which would take the answer from a script that uses them itself.
        flag = torch.tensor(int(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _log(self, scalars: Mapping[str, float]) -> None:
        self.accelerator.log(dict(scalars), step=self.steps)

    def _log_images(self) -> None:
        trackers = [tracker for tracker in self.accelerator.trackers if tracker.name in _IMAGES]
        if self.accelerator.is_main_process and trackers:
            for name, image in self.images().items():
                for tracker in trackers:
                    _IMAGES[tracker.name](tracker, name, image, self.steps)


def _to_tensorboard(tracker: Any, name: str, image: Any, step: int) -> None:
    tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")


def _to_wandb(tracker: Any, name: str, image: Any, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


def _to_trackio(tracker: Any, name: str, image: Any, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(image)}, step=step)


_IMAGES = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "swanlab": _to_wandb, "trackio": _to_trackio}
