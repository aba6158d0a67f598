from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from numpy import uint8
from numpy.typing import NDArray
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_images(
    callbacks: Iterable[TrainerCallback], images: Callable[[], Mapping[str, NDArray[uint8]]], step: int
) -> None:
    """Send images to those of the Trainer's reporters that take some; they are not drawn if none does."""
    senders = [send for callback in callbacks if (send := _sender(callback)) is not None]
    if senders:
        for name, image in images().items():
            for send in senders:
                send(name, image, step)


def _sender(callback: TrainerCallback) -> Callable[[str, NDArray[uint8], int], None] | None:
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        return lambda name, image, step: callback.tb_writer.add_image(name, image, step, dataformats="HWC")
    if isinstance(callback, WandbCallback):
        return _to_wandb
    if isinstance(callback, TrackioCallback):
        return _to_trackio
    return None


def _to_wandb(name: str, image: Any, step: int) -> None:
    import wandb

    wandb.log({name: wandb.Image(image), "train/global_step": step})


def _to_trackio(name: str, image: Any, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(image), "train/global_step": step})
