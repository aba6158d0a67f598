"""The norm of the task vector, computed apart from the package, stays where it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready import NormGovernor, Peer
from tests.sharded import adapter
from tests.training.small import Net, expert, state_of
from tests.training.techniques.runs import run


def norm(state: dict[str, Tensor]) -> float:
    base = Net().state_dict()
    return float(sum((state[n].double() - base[n].double()).square().sum() for n in base) ** 0.5)


def test_it_never_goes_beyond(tmp_path: Path) -> None:
    free = norm(run(tmp_path / "free", []))
    seen = []
    run(
        tmp_path / "held",
        [NormGovernor(max_norm=free / 2)],
        after=lambda step, model, *_: seen.append(norm(state_of(model))),
    )
    assert max(seen) <= free / 2 * (1 + 1e-5)
    assert seen[-1] == pytest.approx(free / 2, rel=1e-5)


def test_the_direction_stays(tmp_path: Path) -> None:
    """One projected step against one free step."""
    base = Net().state_dict()
    free, held = (
        run(tmp_path / str(n), t, steps=1) for n, t in enumerate(([], [NormGovernor(max_norm=0.01)]))
    )
    for name, start in base.items():
        expected = (free[name].double() - start) * (0.01 / norm(free))
        assert torch.allclose(held[name].double() - start, expected, atol=1e-6)


@pytest.mark.parametrize("grow", [False, True])
def test_peers_set_the_band(tmp_path: Path, grow: bool) -> None:
    states = [state_of(expert(2, steps)) for steps in (5, 40, 80)]
    middle = sorted(map(norm, states))[1]
    peers = [Peer(state, name=f"peer {i}") for i, state in enumerate(states)]
    end = norm(run(tmp_path, [NormGovernor(band=0.1, grow=grow)], peers=peers, steps=2))
    assert norm(run(tmp_path / "free", [], steps=2)) < 0.9 * middle
    assert (end == pytest.approx(0.9 * middle, rel=1e-5)) is grow


def test_an_adapter_is_held_by_its_effective_change(tmp_path: Path) -> None:
    model: nn.Module = adapter(Net())
    run(tmp_path, [NormGovernor(max_norm=0.2)], model=model)
    state = state_of(model)
    total = 0.0
    for name in ("embed", "layers.0", "layers.1"):
        A, B = (state[f"base_model.model.{name}.lora_{x}.default.weight"].double() for x in "AB")
        total += float((2.0 * B @ A).square().sum())
    for leaf in ("weight", "bias"):
        now = state[f"base_model.model.head.modules_to_save.default.{leaf}"].double()
        total += float((now - state[f"base_model.model.head.original_module.{leaf}"]).square().sum())
    assert total**0.5 == pytest.approx(0.2, rel=1e-4)
