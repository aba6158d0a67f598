"""The same short run under every trainer: same weights, same data in the same order, same optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

import mergeready
import mergeready.accelerate
import mergeready.fabric
import mergeready.lightning
import mergeready.transformers
from mergeready import MergedPlateau, Probe, Schedule
from tests.models import perturb, tiny_bert
from tests.trainers import Tokens, make_trainer, right_or_wrong

STEPS = 12


def make_world(folder: Path) -> Path:
    """A base and two peers on disk."""
    base = tiny_bert()
    # Without dropout, since trainers draw their random numbers at different moments.
    base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.0
    base.save_pretrained(folder / "base")
    for seed in (1, 2):
        perturb(tiny_bert(), seed).save_pretrained(folder / f"peer-{seed}")
    return folder


def load(world: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(world / "base").train()


def options(world: Path, **changes: Any) -> dict[str, Any]:
    """The arguments that every shell takes."""
    probe = Probe(
        merge=["ties", "task_arithmetic"],
        scales=(0.4, 0.8),
        max_evaluations=3,
        evaluate=right_or_wrong(),
        schedule=Schedule(every=3, geometric=False),
    )
    return {
        "base": world / "base",
        "peers": [world / "peer-1", world / "peer-2"],
        "probe": probe,
        "measure": Schedule(every=2),
        "stop": MergedPlateau(patience=100),
    } | changes


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


def loader(batch_size: int = 8) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Tokens(), batch_size=batch_size)


def batches(data: Any, first: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches without end, epoch after epoch, from a position on."""
    position = 0
    while True:
        for batch in data:
            if position >= first:
                yield batch
            position += 1


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.net)


def lightning_trainer(folder: Path, *callbacks: Any, **changes: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | changes))


class Crash(Exception):
    """What ends a run in the middle."""


class Saving:
    """How a test run saves, crashes and resumes.

    Attributes:
        every: Save a checkpoint every so many steps; None for never.
        crash: Crash after this step.
        resume: Start from the newest checkpoint.
        die: How to crash.
    """

    def __init__(
        self,
        every: int | None = None,
        crash: int | None = None,
        resume: bool = False,
        die: Callable[[], None] | None = None,
    ) -> None:
        self.every, self.crash, self.resume = every, crash, resume
        self._die = die

    def after(self, step: int) -> None:
        if step == self.crash:
            if self._die is not None:
                self._die()
            raise Crash

    def newest(self, folder: Path) -> Path | None:
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        return found[-1] if self.resume else None


class Crasher(pl.Callback):
    def __init__(self, saving: Saving) -> None:
        self.saving = saving

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.saving.after(trainer.global_step)


NEVER = Saving()


def run_transformers(world: Path, folder: Path, **changes: Any) -> nn.Module:
    model = load(world)
    trainer = make_trainer(
        folder,
        mergeready.transformers.MergeReadyCallback(**options(world, **changes)),
        model=model,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer.train()
    return model


def run_lightning(world: Path, folder: Path, saving: Saving = NEVER, **changes: Any) -> nn.Module:
    model = load(world)
    callbacks = [mergeready.lightning.MergeReadyCallback(**options(world, **changes)), Crasher(saving)]
    if saving.every:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                folder, "checkpoint-{step}", every_n_train_steps=saving.every, save_top_k=-1
            )
        )
    lightning_trainer(folder, *callbacks).fit(Lit(model), loader(), ckpt_path=saving.newest(folder))
    return model


def run_accelerate(world: Path, folder: Path, saving: Saving = NEVER, **changes: Any) -> nn.Module:
    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    model = load(world)
    prepared, optimizer, data = accelerator.prepare(model, optimizer_of(model), loader())
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world, **changes))
    if checkpoint := saving.newest(folder):
        accelerator.load_state(str(checkpoint))
    monitor.prepare(prepared, total_steps=STEPS, optimizer=optimizer)
    save = lambda path: accelerator.save_state(str(path))  # noqa: E731
    _drive(monitor, prepared, optimizer, data, folder, saving, save, accelerator.backward)
    return model


def run_fabric(world: Path, folder: Path, saving: Saving = NEVER, **changes: Any) -> nn.Module:
    fabric = Fabric(accelerator="cpu")
    model = load(world)
    prepared, optimizer = fabric.setup(model, optimizer_of(model))
    data = fabric.setup_dataloaders(loader())
    monitor = mergeready.fabric.MergeReadyLoop(fabric, folder / "mergeready", **options(world, **changes))
    state = {"model": prepared, "optimizer": optimizer, "monitor": monitor}
    if checkpoint := saving.newest(folder):
        fabric.load(checkpoint, state)
    monitor.prepare(prepared, total_steps=STEPS, optimizer=optimizer)
    save = lambda path: fabric.save(path, state)  # noqa: E731
    _drive(monitor, prepared, optimizer, data, folder, saving, save, fabric.backward)
    return model


def run_plain(world: Path, folder: Path, saving: Saving = NEVER, **changes: Any) -> nn.Module:
    model = load(world)
    optimizer = optimizer_of(model)
    monitor = mergeready.MergeReadyLoop(folder / "mergeready", **options(world, **changes))
    parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
    if checkpoint := saving.newest(folder):
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
    monitor.prepare(model, total_steps=STEPS, optimizer=optimizer)
    save = lambda path: torch.save({n: part.state_dict() for n, part in parts.items()}, path)  # noqa: E731
    _drive(monitor, model, optimizer, loader(), folder, saving, save, Tensor.backward)
    return model


def _drive(
    monitor: mergeready.MergeReadyLoop,
    model: nn.Module,
    optimizer: Any,
    data: Any,
    folder: Path,
    saving: Saving,
    save: Callable[[Path], None],
    backward: Callable[[Tensor], None],
) -> None:
    for batch in batches(data, monitor.steps):
        for _ in monitor.passes():
            backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        saving.after(monitor.steps)
        if saving.every and monitor.steps % saving.every == 0:
            save(folder / f"checkpoint-{monitor.steps}")
        if monitor.should_stop or monitor.steps >= STEPS:
            break
    monitor.finish()


Run = Callable[..., nn.Module]
RUNS: dict[str, Run] = {
    "transformers": run_transformers,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "fabric": run_fabric,
    "plain": run_plain,
}
