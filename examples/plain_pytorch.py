"""A loop of your own, with a technique: the norm governor keeps the task vector as long as the peers' are.

The run is made twice, without and with it; norms that differ much harm most ways to merge.
"""

import argparse

import torch
from languages import accuracy, load_model, loader, make_base, make_expert, show

from mergeready import MergeReadyLoop, NormGovernor, Peer, Probe, Schedule

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 40 if parser.parse_args().quick else 200


def run(name, techniques):
    torch.manual_seed(0)
    model = load_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-2)  # far more than the peer was trained with
    monitor = MergeReadyLoop(
        f"example-runs/plain-{name}",
        base=make_base(),
        peers=[Peer(make_expert("south"), evaluate=accuracy("south"), name="south")],
        probe=Probe(merge="task_arithmetic", evaluate=accuracy("north"), schedule=Schedule(every=steps // 2)),
        measure=Schedule(every=steps // 2),
        techniques=techniques,
    )
    monitor.prepare(model, total_steps=steps, optimizer=optimizer)
    while monitor.steps < steps:
        for batch in loader("north"):
            for _ in monitor.passes():  # techniques may move the weights for the time of a pass
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            if monitor.steps == steps:
                break
    monitor.finish()
    show(monitor.history)
    [peer] = monitor.history.start.peers.values()
    norm = monitor.history.metrics[-1].norm
    print(f"{name}: norm {norm:.2f}, the peer's {peer:.2f}, ratio {norm / peer:.2f}\n")


run("ungoverned", [])
run("governed", [NormGovernor(band=0.1)])
