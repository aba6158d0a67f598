"""The same with a LoRA adapter: what is measured and merged is what the adapter does to the weights.

The peer is a full checkpoint; adapters and checkpoints mix.
"""

import argparse

from languages import QUIET, accuracy, examples, load_model, make_base, make_expert, show
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from mergeready import Peer, Probe, Schedule, inspect
from mergeready.transformers import MergeReadyCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200

targets = ["query", "key", "value", "dense", "classifier"]
model = get_peft_model(load_model(), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
callback = MergeReadyCallback(
    base=make_base(),
    peers=[Peer(make_expert("south"), evaluate=accuracy("south"), name="south")],
    probe=Probe(merge="task_arithmetic", evaluate=accuracy("north"), schedule=Schedule(every=steps // 4)),
)
trainer = Trainer(
    model,
    TrainingArguments(
        "example-runs/trainer_lora",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **QUIET,
    ),
    train_dataset=examples("north", "train"),
    callbacks=[callback],
)
trainer.remove_callback(PrinterCallback)  # the table below says the same
trainer.train()
show(callback.history)

model.save_pretrained("example-runs/trainer_lora/adapter")
found = inspect(make_base(), "example-runs/trainer_lora/adapter")
print(f"the adapter moves the weights by {found.norm:.2f}, {found.relative_norm:.0%} of the base's norm")
