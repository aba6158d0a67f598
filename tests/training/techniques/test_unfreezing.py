"""Layers that are unfrozen, or frozen, on the way: techniques act on what trains, and a resumed run alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready import DriftPenalty, MergeReadyLoop, NormGovernor, Schedule, SparseMask, WeightAverage
from mergeready.training.techniques.technique import Technique
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.every import CASES, masks
from tests.training.techniques.runs import net

STEPS, THAW = 8, 3
WHOLE = [
    "distilled_finish",
    "drift_penalty",
    "jacobian_penalty",
    "kronecker_filter",
    "kronecker_penalty",
    "norm_governor",
    "peer_projection",
    "sharpness_aware",
    "simulated_merge",
    "sparse_mask",
    "sparse_mask, given",
    "weight_average",
    "weight_average, last",
]


def gradual(
    folder: Path,
    technique: Technique,
    *,
    train: dict[int, bool] | None = None,
    state: dict[str, Any] | None = None,
    keep: int = 0,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any], MergeReadyLoop]:
    """A run whose first layer trains, or not, from some steps on; the weights at its end, and its state at one step."""
    model = net()
    model.embed.requires_grad_(state is not None or not (train or {}).get(THAW, True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    settings: dict[str, Any] = {"base": Net().state_dict(), "measure": Schedule(every=1), "picks": None}
    monitor = MergeReadyLoop(folder, techniques=[technique], **(settings | options))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "monitor": monitor}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(state[name]))
    monitor.prepare(model, optimizer=optimizer, total_steps=STEPS)
    kept: dict[str, Any] = {}
    while monitor.steps < STEPS:
        if monitor.steps in (train or {}):
            model.embed.requires_grad_((train or {})[monitor.steps])
        x, y = examples(1, monitor.steps, 16)
        for _ in monitor.passes():
            cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.steps == keep:
            kept = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    monitor.finish()
    return state_of(model), kept, monitor


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_that_is_resumed_after_unfreezing_equals_an_uninterrupted_one(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    options = {"peers": list(case.peers)}
    whole, state, _ = gradual(tmp_path / "whole", case.technique, train={THAW: True}, keep=5, **options)
    resumed, _, _ = gradual(tmp_path / "parts", case.technique, state=state, **options)
    assert equal(whole, resumed)
    assert not torch.equal(whole["embed.weight"], Net().state_dict()["embed.weight"]) or "mask" in name


def test_a_layer_that_no_mask_names_stays_at_the_base(tmp_path: Path) -> None:
    named = {name: mask for name, mask in masks().items() if not name.startswith("embed")}
    end, _, _ = gradual(tmp_path, SparseMask(masks=named), train={THAW: True})
    base = Net().state_dict()
    assert torch.equal(end["embed.weight"], base["embed.weight"])
    assert not equal(end, base)


def test_the_average_counts_a_layer_from_the_start(tmp_path: Path) -> None:
    """As if it had been averaged all along, while it stood at the base."""
    frozen_first, _, _ = gradual(tmp_path / "frozen", WeightAverage(kind="mean"), train={THAW: True})
    seen: list[Tensor] = []
    plain = WeightAverage(kind="last", count=1)
    for steps in range(1, STEPS + 1):
        _, state, _ = gradual(tmp_path / str(steps), plain, train={THAW: True}, keep=steps)
        seen.append(state["model"]["embed.weight"])
    torch.testing.assert_close(frozen_first["embed.weight"], torch.stack(seen).mean(0))


def test_the_norm_is_held_and_measured_with_the_layer(tmp_path: Path) -> None:
    end, _, monitor = gradual(tmp_path, NormGovernor(max_norm=0.3), train={THAW: True}, sampled_every=1)
    base = Net().state_dict()
    norm = float(torch.cat([(end[name] - value).flatten() for name, value in base.items()]).norm())
    assert norm == pytest.approx(0.3, rel=1e-4)
    assert monitor.history.metrics[-1].norm == pytest.approx(norm, rel=1e-4)
    assert monitor.history.sampled[-1].norm == pytest.approx(
        norm, rel=1e-4
    )  # so small a model is sampled whole


@pytest.mark.parametrize("technique", [DriftPenalty(strength=0.5), CASES["kronecker_penalty"].technique])
def test_a_layer_that_is_frozen_on_the_way_stands_still(tmp_path: Path, technique: Technique) -> None:
    end, state, _ = gradual(tmp_path, technique, train={THAW: False}, keep=THAW)
    assert torch.equal(end["embed.weight"], state["model"]["embed.weight"])
    assert not torch.equal(end["head.weight"], state["model"]["head.weight"])
