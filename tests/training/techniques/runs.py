"""Short runs of the small net with techniques, in a loop of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready import MergeReadyLoop
from tests.training.small import Net, examples, state_of


def net() -> Net:
    """The small net without dropout, since micro-batches draw other masks than their batch."""
    model = Net()
    model.dropout.p = 0.0
    return model


def run(
    folder: Path,
    techniques: list[Any],
    *,
    micro: int = 1,
    steps: int = 6,
    model: nn.Module | None = None,
    state: dict[str, Any] | None = None,
    after: Callable[[int, nn.Module, MergeReadyLoop, torch.optim.Optimizer], Any] | None = None,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights after some steps, each on a batch of its own; goes on from what ``after`` saved as ``state``.

    A ``scale`` other than 1 is that of a gradient scaler.
    """
    model = net() if model is None else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    monitor = MergeReadyLoop(folder, techniques=techniques, **options)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    monitor.prepare(model, optimizer=optimizer, total_steps=steps, scaler=scaler if scale != 1 else None)
    while monitor.steps < steps and not monitor.should_stop:
        x, y = examples(1, monitor.steps, 16)
        for _ in monitor.passes():
            for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
                scaler.scale(cross_entropy(model(xs), ys) / micro).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        monitor.step()
        if after is not None:
            after(monitor.steps, model, monitor, optimizer)
    before = state_of(model)
    monitor.finish()
    run.before_the_end = before  # type: ignore[attr-defined]
    return state_of(model)


def saved(model: nn.Module, monitor: MergeReadyLoop, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds."""
    import copy

    parts = {"model": model, "optimizer": optimizer, "monitor": monitor}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
