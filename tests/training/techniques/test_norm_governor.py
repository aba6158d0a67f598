"""The norm of the task vector, computed apart from the package, stays where it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeready import NormGovernor, Peer
from mergeready.errors import OptionError
from mergeready.experts import Base, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from tests.sharded import adapter
from tests.training.small import Net, expert, state_of
from tests.training.techniques.runs import net, run


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


def test_it_is_checked_every_so_many_steps_and_at_the_last(tmp_path: Path) -> None:
    free = norm(run(tmp_path / "free", []))
    seen = []
    run(
        tmp_path / "held",
        [NormGovernor(max_norm=free / 20, every=4)],
        after=lambda step, model, *_: seen.append(norm(state_of(model))),
    )
    limit = free / 20 * (1 + 1e-5)
    assert [value <= limit for value in seen] == [False, False, False, True, False, True]


@pytest.mark.parametrize("known", ["weights", "fingerprints"])
def test_the_limit_is_the_band_above_the_peers_median(tmp_path: Path, known: str) -> None:
    states = [state_of(expert(2, steps)) for steps in (1, 3, 60)]
    norms = sorted(map(norm, states))
    limit = 1.1 * norms[1]
    assert limit < 0.9 * sum(norms) / 3, "median and mean cannot be told apart"
    peers: list[Any] = [Peer(state, name=f"peer {i}") for i, state in enumerate(states)]
    if known == "fingerprints":
        base = Base.open(Net())
        vectors = [open_expert(state, base).vector for state in states]
        peers = [take_fingerprint(v, base, label=f"peer {i}") for i, v in enumerate(vectors)]
    assert norm(run(tmp_path / "free", [])) > 1.5 * limit
    end = norm(run(tmp_path / "held", [NormGovernor(band=0.1)], peers=peers))
    assert end == pytest.approx(limit, rel=1e-5)


def test_growing_needs_a_band_that_leaves_something() -> None:
    with pytest.raises(OptionError, match="`grow` needs"):
        NormGovernor(grow=True, band=1.0)


@pytest.mark.parametrize("grow", [False, True])
def test_peers_set_the_band(tmp_path: Path, grow: bool) -> None:
    states = [state_of(expert(2, steps)) for steps in (5, 40, 80)]
    middle = sorted(map(norm, states))[1]
    peers = [Peer(state, name=f"peer {i}") for i, state in enumerate(states)]
    end = norm(run(tmp_path, [NormGovernor(band=0.1, grow=grow)], peers=peers, steps=2))
    assert norm(run(tmp_path / "free", [], steps=2)) < 0.9 * middle
    assert (end == pytest.approx(0.9 * middle, rel=1e-5)) is grow


def effective_norm(state: dict[str, Tensor]) -> float:
    total = 0.0
    for name in ("embed", "layers.0", "layers.1"):
        A, B = (state[f"base_model.model.{name}.lora_{x}.default.weight"].double() for x in "AB")
        total += float((2.0 * B @ A).square().sum())
    for leaf in ("weight", "bias"):
        now = state[f"base_model.model.head.modules_to_save.default.{leaf}"].double()
        total += float((now - state[f"base_model.model.head.original_module.{leaf}"]).square().sum())
    return total**0.5


def test_an_adapter_is_held_by_its_effective_change(tmp_path: Path) -> None:
    model: nn.Module = adapter(Net())
    seen = []
    run(
        tmp_path,
        [NormGovernor(max_norm=0.2)],
        model=model,
        after=lambda step, model, *_: seen.append(effective_norm(state_of(model))),
    )
    assert seen == pytest.approx([0.2] * 6, rel=1e-4)


def test_of_an_adapter_the_second_factor_is_scaled(tmp_path: Path) -> None:
    free, held = (
        run(tmp_path / str(n), t, steps=1, model=adapter(net()))
        for n, t in enumerate(([], [NormGovernor(max_norm=0.2)]))
    )
    share = 0.2 / effective_norm(free)
    assert share < 0.9
    for name, value in free.items():
        if "lora_" in name:
            torch.testing.assert_close(held[name], value * share if "lora_B" in name else value)
