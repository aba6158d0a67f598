"""Watch a loop with accelerate and gradient accumulation; two calls are added to it."""

import argparse

import torch
from accelerate import Accelerator
from languages import accuracy, load_model, loader, make_base, make_expert, show

from mergeready import ExpertPlateau, Peer, Probe, Schedule
from mergeready.accelerate import MergeReadyLoop

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir="example-runs/accelerate")
model = load_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, loader("north", batch_size=8))

monitor = MergeReadyLoop(
    accelerator,
    base=make_base(),
    peers=[Peer(make_expert("south"), evaluate=accuracy("south"), name="south")],
    probe=Probe(merge="task_arithmetic", evaluate=accuracy("north"), schedule=Schedule(every=steps // 4)),
    stop=ExpertPlateau(patience=1),
    on_stop="record",  # only note when ordinary early stopping would have ended the run
)
monitor.prepare(model, total_steps=steps)
while monitor.steps < steps and not monitor.should_stop:
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        monitor.step()  # micro-batches are not counted
        if monitor.steps == steps or monitor.should_stop:
            break
monitor.finish()
accelerator.end_training()

show(monitor.history)
noted = [decision.step for decision in monitor.history.decisions]
print(f"{monitor.steps} optimizer steps; early stopping would have ended the run at step {noted or 'none'}")
