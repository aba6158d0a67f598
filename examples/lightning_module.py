"""Watch a LightningModule; ModelCheckpoint keeps the weights whose merge is best."""

import argparse

import torch
from languages import accuracy, load_model, loader, make_base, make_expert, show
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mergeready import Peer, Probe, Schedule
from mergeready.lightning import MergeReadyCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = load_model()

    def training_step(self, batch, index):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=3e-3)


monitored = "mergeready/merged/task_arithmetic"
callback = MergeReadyCallback(
    model="net",
    base=make_base(),
    peers=[Peer(make_expert("south"), evaluate=accuracy("south"), name="south")],
    probe=Probe(merge="task_arithmetic", evaluate=accuracy("north"), schedule=Schedule(every=steps // 4)),
)
checkpoint = ModelCheckpoint(monitor=monitored, mode="max", every_n_train_steps=steps // 4)
trainer = Trainer(
    max_steps=steps,
    accelerator="cpu",
    callbacks=[callback, checkpoint],
    default_root_dir="example-runs/lightning",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), loader("north"))

show(callback.history)
print(f"best {monitored}: {checkpoint.best_model_score:.3f}")
