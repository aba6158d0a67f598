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
    probe = Probe(merge=["ties", "task_arithmetic"], evaluate=right_or_wrong(), schedule=Schedule(every=3))
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


def run_lightning(world: Path, folder: Path, **changes: Any) -> nn.Module:
    model = load(world)
    callback = mergeready.lightning.MergeReadyCallback(**options(world, **changes))
    lightning_trainer(folder, callback).fit(Lit(model), loader())
    return model


def run_accelerate(world: Path, folder: Path, **changes: Any) -> nn.Module:
    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    model = load(world)
    prepared, optimizer, data = accelerator.prepare(model, optimizer_of(model), loader())
    monitor = mergeready.accelerate.MergeReadyLoop(accelerator, **options(world, **changes))
    monitor.prepare(prepared, total_steps=STEPS)
    for batch in batches(data):
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.should_stop or monitor.steps == STEPS:
            break
    monitor.finish()
    return model


def run_fabric(world: Path, folder: Path, **changes: Any) -> nn.Module:
    fabric = Fabric(accelerator="cpu")
    model = load(world)
    prepared, optimizer = fabric.setup(model, optimizer_of(model))
    data = fabric.setup_dataloaders(loader())
    monitor = mergeready.fabric.MergeReadyLoop(fabric, folder / "mergeready", **options(world, **changes))
    monitor.prepare(prepared, total_steps=STEPS)
    for batch in batches(data):
        fabric.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.should_stop or monitor.steps == STEPS:
            break
    monitor.finish()
    return model


def run_plain(world: Path, folder: Path, **changes: Any) -> nn.Module:
    model = load(world)
    optimizer = optimizer_of(model)
    monitor = mergeready.MergeReadyLoop(folder / "mergeready", **options(world, **changes))
    monitor.prepare(model, total_steps=STEPS)
    for batch in batches(loader()):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.should_stop or monitor.steps == STEPS:
            break
    monitor.finish()
    return model


Run = Callable[..., nn.Module]
RUNS: dict[str, Run] = {
    "transformers": run_transformers,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "fabric": run_fabric,
    "plain": run_plain,
}
