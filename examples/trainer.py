"""Watch a transformers Trainer, keep the checkpoint that merges best, and stop when merging no longer improves."""

import argparse
import json

from languages import QUIET, accuracy, examples, load_model, make_base, make_expert, show
from transformers import PrinterCallback, Trainer, TrainingArguments

from mergeready import MergedPlateau, Peer, Probe, Schedule
from mergeready.transformers import MergeReadyCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200

callback = MergeReadyCallback(
    base=make_base(),
    peers=[Peer(make_expert("south"), evaluate=accuracy("south"), name="south")],
    probe=Probe(
        merge=["task_arithmetic", "ties"], evaluate=accuracy("north"), schedule=Schedule(every=steps // 4)
    ),
    stop=MergedPlateau(patience=2, min_step=steps // 2),
)
trainer = Trainer(
    load_model(),
    TrainingArguments(
        "example-runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        **QUIET,
    ),
    train_dataset=examples("north", "train"),
    callbacks=[callback],
)
trainer.remove_callback(PrinterCallback)  # the table below says the same
trainer.train()

show(callback.history)
for decision in callback.history.decisions:
    print(f"stopped at step {decision.step}: {decision.reason}")
with open("example-runs/trainer/mergeready/picks/picks.json", encoding="utf-8") as file:
    for name, pick in json.load(file).items():
        print(f"kept {name}: step {pick['step']}")
