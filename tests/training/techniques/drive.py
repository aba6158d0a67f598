"""Runs of a technique without a monitor: the same calls that every shell makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready.experts import Base, LiveExpert
from mergeready.training.peers import open_peers, open_sketches
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique_set import TechniqueSet
from tests.training.small import Net, examples


def started(
    techniques: Sequence[Any],
    model: nn.Module,
    base: Any = None,
    *,
    peers: Sequence[Any] = (),
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    saved: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None,
) -> TechniqueSet:
    chosen = TechniqueSet(techniques)
    chosen.prepare(model, step=step)
    if saved is not None:
        chosen.load(*saved)

    def make() -> TechniqueRun:
        live = LiveExpert(model, base)
        opened: Base = live.base
        return TechniqueRun(
            live,
            optimizer=optimizer,
            peers=open_peers(peers, opened),
            sketched=open_sketches(peers, opened),
            step=step,
        )

    chosen.start(make)
    return chosen


def task_loss(model: nn.Module, step: int, part: int, parts: int) -> Tensor:
    x, y = examples(1, step % 7, 16)
    return cross_entropy(model(x.chunk(parts)[part]), y.chunk(parts)[part]) / parts


def train(
    chosen: TechniqueSet,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    last: int,
    *,
    micro: int = 1,
    loss: Callable[[nn.Module, int, int, int], Tensor] = task_loss,
) -> None:
    for step in range(first, last + 1):
        for _ in chosen.passes():
            for part in range(micro):
                loss(model, step, part, micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen.took_step(step)


def net() -> Net:
    """Without dropout, whose draws differ between micro-batches."""
    model = Net()
    model.dropout.p = 0.0
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
