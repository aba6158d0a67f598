"""A script as users write it, for ``accelerate launch`` and torchrun: trains, saves, may be killed, resumes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from mergeready import MergedPlateau, Picks, Probe, Schedule
from tests.training.small import Evaluation, Net, examples

STEPS, SAVE_EVERY = 10, 4
Kill: TypeAlias = set[tuple[int, int]]
"""After which step which rank is killed."""


def options(world: Path) -> dict[str, Any]:
    return {
        "base": world / "base",
        "peers": [world / "peer"],
        "probe": Probe(merge=["ties", "average"], evaluate=Evaluation(0), schedule=Schedule(every=3)),
        "measure": Schedule(every=2),
        "stop": MergedPlateau(patience=100),
        "picks": Picks(pareto=2),
    }


def by_accelerate(world: Path, folder: Path, kill_at: Kill, resume: Path | None) -> torch.nn.Module:
    from accelerate import Accelerator

    from mergeready.accelerate import MergeReadyLoop

    accelerator, model = Accelerator(cpu=True, project_dir=str(folder)), Net()
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    monitor = MergeReadyLoop(accelerator, share=None, **options(world))
    if resume is not None:
        accelerator.load_state(str(resume))
    monitor.prepare(prepared, total_steps=STEPS)
    save = lambda path: accelerator.save_state(str(path))  # noqa: E731
    drive(monitor, prepared, optimizer, accelerator.backward, save, folder, kill_at)
    return model


def by_fabric(world: Path, folder: Path, kill_at: Kill, resume: Path | None) -> torch.nn.Module:
    from lightning.fabric import Fabric

    from mergeready.fabric import MergeReadyLoop

    fabric, model = Fabric(accelerator="cpu", devices=2, strategy="ddp"), Net()
    fabric.launch()
    prepared, optimizer = fabric.setup(model, optimizer_of(model))
    monitor = MergeReadyLoop(fabric, folder / "mergeready", **options(world))
    state = {"model": prepared, "optimizer": optimizer, "monitor": monitor}
    if resume is not None:
        fabric.load(resume, state)
    monitor.prepare(prepared, total_steps=STEPS)
    drive(
        monitor, prepared, optimizer, fabric.backward, lambda path: fabric.save(path, state), folder, kill_at
    )
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def drive(
    monitor: Any,
    model: Any,
    optimizer: Any,
    backward: Callable[[Any], None],
    save: Callable[[Path], None],
    folder: Path,
    kill_at: Kill,
) -> None:
    """Steps whose batches depend on their number and the rank alone."""
    rank = int(os.environ["RANK"])
    while monitor.steps < STEPS:
        step = monitor.steps + 1
        torch.manual_seed(1000 * rank + step)  # for dropout
        x, y = examples(0, 10 * rank + step, 16)
        model.train()
        backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if (step, rank) in kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % SAVE_EVERY == 0:
            save(folder / f"checkpoint-{step}")
    monitor.finish()


RUNS = {"accelerate": by_accelerate, "fabric": by_fabric}


def main(name: str, world: Path, folder: Path, kill_at: Kill, resume: Path | None) -> None:
    torch.set_num_threads(1)
    model = RUNS[name](world, folder, kill_at, resume)
    if os.environ["RANK"] == "0":
        torch.save(model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    given = sys.argv[1:]
    kill = {(int(given[3]), int(rank)) for rank in given[4].split(",") if rank}
    main(given[0], Path(given[1]), Path(given[2]), kill, Path(given[5]) if given[5] else None)
    sys.stdout.flush()
    os._exit(0)  # the other rank may be gone, and leaving the group in order would wait for it
