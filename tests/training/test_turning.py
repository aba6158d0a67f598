"""Runs under an optimizer that trains other weights than it evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready import (
    DistilledFinish,
    DriftPenalty,
    MergeReadyLoop,
    NormGovernor,
    Probe,
    Schedule,
    WeightAverage,
)
from mergeready.errors import UnsupportedError
from mergeready.training.turning import turned, turning
from tests.training.averaging import Averaging
from tests.training.small import Net, equal, examples, expert, state_of
from tests.training.techniques.runs import net

ALWAYS = Schedule(every=1, geometric=False)


@pytest.mark.parametrize("turns_itself", [True, False])
def test_what_is_to_be_evaluated_is_measured_merged_and_picked(tmp_path: Path, turns_itself: bool) -> None:
    """Also where the evaluation turns the weights, as it would have to without us; training goes on bit for bit."""
    trained: list[dict[str, Tensor]] = []
    seen: list[Tensor] = []
    base, peer = Net().state_dict(), state_of(expert(2))
    for watched in (False, True):
        model = net()
        optimizer = Averaging(model.parameters(), lr=0.05)
        optimizer.train()

        def evaluate(model: nn.Module, optimizer: Any = optimizer) -> dict[str, float]:
            if turns_itself:
                optimizer.eval()
            seen.append(model.state_dict()["head.weight"].clone())
            if turns_itself:
                optimizer.train()
            return {"score": 1.0}

        probe = Probe(evaluate=evaluate, scales=(1.0,), max_evaluations=1, schedule=ALWAYS)
        monitor = MergeReadyLoop(tmp_path, base=base, peers=[peer], probe=probe, measure=ALWAYS)
        if watched:
            monitor.prepare(model, optimizer=optimizer)
        for step in range(4):
            x, y = examples(1, step, 16)
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if watched:
                monitor.step()
        trained.append(state_of(model))
    assert equal(*trained)
    # Half way to where training began; see ``Averaging``.
    change = {name: 0.5 * (trained[0][name] - value) for name, value in base.items()}
    norm = float(torch.cat([value.flatten() for value in change.values()]).norm())
    assert monitor.history.metrics[-1].norm == pytest.approx(norm, rel=1e-5)
    name = "head.weight"
    torch.testing.assert_close(seen[-2], base[name] + change[name])
    torch.testing.assert_close(seen[-1], change[name] + peer[name])


def test_one_that_has_turned_already_stays_so() -> None:
    """As inside a framework's own evaluation."""
    model = net()
    optimizer = Averaging(model.parameters(), lr=0.05)
    optimizer.train()
    model(examples(1, 0, 4)[0]).sum().backward()
    optimizer.step()
    optimizer.eval()
    before = state_of(model)
    with turned(turning([optimizer])):
        assert equal(before, state_of(model))
    assert not optimizer.param_groups[0]["training"]
    assert equal(before, state_of(model))


@pytest.mark.parametrize(
    ("technique", "refused"),
    [
        (WeightAverage(), True),
        (NormGovernor(max_norm=1.0), True),
        (DistilledFinish(inputs=[examples(1, 0, 4)[0]], norm=1.0), True),
        (DriftPenalty(), False),
    ],
)
def test_techniques_that_write_weights_are_refused(tmp_path: Path, technique: Any, refused: bool) -> None:
    model = net()
    monitor = MergeReadyLoop(tmp_path, techniques=[technique])
    optimizer = Averaging(model.parameters(), lr=0.05)
    if not refused:
        monitor.prepare(model, optimizer=optimizer)
        return
    with pytest.raises(UnsupportedError, match=f"would turn what {technique.name} writes"):
        monitor.prepare(model, optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks
