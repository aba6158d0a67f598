"""Of a model that is spread over ranks, what it holds inside the block equals what one process holds; afterwards,
nothing happened, also when a rank failed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import NonFiniteError
from mergeready.experts import LiveExpert
from mergeready.merging import MergedInPlace
from mergeready.training.surrogates import Surrogates, synthetic_peers
from mergeready.training.techniques.moving import moved
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import local
from tests.ranks import run_ranks
from tests.sharded import ON_FOUR, ON_TWO, adapter, full_state, local_bits, net_like, spread
from tests.training.small import Net, equal, examples, expert, save, train

METHODS = ("task_arithmetic", "ties", "dare_ties", "della", "model_stock", "pcb", "tsv_m")
SCALES = (0.5, 1.0)
X = examples(0, 0, 4)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    save(Net(), path / "base")
    for seed in (2, 3):
        save(expert(seed), path / f"peer{seed}")
    return path


def peers(folder: Path) -> list[Path]:
    return [folder / "peer2", folder / "peer3"]


def merged_states(live: LiveExpert, folder: Path) -> dict[Any, dict[str, Tensor]]:
    """What the model holds, by method and scale; it is evaluated at each, as that is what leaves traces."""
    found = {}
    for method in (*METHODS, "surrogates"):
        others: Any = peers(folder)
        if method == "surrogates":
            others = synthetic_peers(live.vector, Surrogates())
        name = "ties" if method == "surrogates" else method
        with MergedInPlace(live, None, others, name) as merged:
            for scale in SCALES:
                merged.set_scale(scale)
                with torch.no_grad():
                    logits = live.model.eval()(X)
                held = {n: full_state_of(target) for n, target in live.targets.items()}
                found[method, scale] = held | {"logits": logits.clone()}
    return found


def full_state_of(target: Tensor) -> Tensor:
    return full_state(_Holder(target))["value"]


class _Holder(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def spread_merges(layouts: Sequence[str], kind: str, folder: Path) -> dict[str, Any]:
    found = {}
    for layout in layouts:
        model = spread(in_training(kind), layout)
        before = local_bits(model)
        live = LiveExpert(model, folder / "base" if kind == "full" else None, Ranks.world())
        states = merged_states(live, folder)
        found[layout] = states, local_bits(model) == before
    return found


def in_training(kind: str) -> nn.Module:
    return expert(1) if kind == "full" else adapter(Net())


@pytest.mark.parametrize(
    ("size", "kind", "layouts"),
    [
        (2, "full", ON_TWO),
        (2, "adapter", ("fsdp2",)),
        # Replicas and plain tensor parallelism are the same code on two ranks.
        pytest.param(
            4, "full", [n for n in ON_FOUR if n not in ("ddp", "tensor_parallel")], marks=pytest.mark.slow
        ),
    ],
)
def test_merged_weights_are_those_of_one_process(
    folder: Path, size: int, kind: str, layouts: Sequence[str]
) -> None:
    live = LiveExpert(in_training(kind), folder / "base" if kind == "full" else None)
    alone = merged_states(live, folder)
    for found in run_ranks(spread_merges, size, layouts, kind, folder):
        for layout in layouts:
            states, restored = found[layout]
            assert restored, layout
            for key, state in alone.items():
                logits, expected = states[key].pop("logits"), state["logits"]
                assert torch.allclose(logits, expected, atol=1e-5), (layout, key, "a pass saw other weights")
                for name, value in states[key].items():
                    # The product of an adapter's factors is not computed in the same pieces.
                    exact = kind == "full" and key[0] != "tsv_m"
                    close = torch.allclose(value, state[name], atol=1e-6)
                    assert torch.equal(value, state[name]) if exact else close, (layout, key, name)


def trained_between(layout: str, folder: Path, probed: bool, raising: bool) -> dict[str, Any]:
    """Four steps, with probes between, an evaluation of which may raise on one rank only."""
    model = spread(Net(), layout)
    live = LiveExpert(model, folder / "base", Ranks.world())
    caught: list[str] = []

    def probe(step: int) -> None:
        if not probed:
            return
        before = local_bits(model)
        try:
            with MergedInPlace(live, None, peers(folder), "ties", scale=0.5), torch.no_grad():
                live.model(X)
                if raising and Ranks.world().rank == 1:
                    raise ValueError("only here")
        except ValueError as error:
            caught.append(str(error))
        assert local_bits(model) == before, f"step {step} left a trace"

    train(model, 0, 4, probe)
    return {"state": full_state(model), "caught": caught}


def trained_thrice(layout: str, folder: Path) -> list[dict[str, Any]]:
    """Without probes, with them, and with those that raise, in one start of the processes."""
    return [
        trained_between(layout, folder, probed, raising)
        for probed, raising in ((False, False), (True, False), (True, True))
    ]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_training_is_the_same_with_and_without_probes(folder: Path, layout: str) -> None:
    found = run_ranks(trained_thrice, 2, layout, folder)
    for rank, (without, probed, raising) in enumerate(found):
        assert equal(without["state"], found[0][0]["state"])
        assert equal(probed["state"], without["state"])
        assert probed["caught"] == []
        assert equal(raising["state"], without["state"])
        assert raising["caught"] == (["only here"] * 4 if rank == 1 else [])


def trained_after_a_pass_that_raised(folder: Path, how: str) -> dict[str, Tensor]:
    """Four steps, with passes between that raise in the middle of the model, where its root is still gathered."""
    model: Any = spread(Net(), "fsdp2")
    live = LiveExpert(model, folder / "base", Ranks.world())

    def fail(*_: Any) -> None:
        raise ValueError("midway")

    def probe(step: int) -> None:
        hook = model.layers[1].register_forward_hook(fail)
        merged: Any = MergedInPlace(live, None, peers(folder), "ties", scale=0.5)
        if how == "moved":
            merged = moved(model, [(local(target), local(target) * 2) for target in live.targets.values()])
        with suppress(ValueError), merged, torch.no_grad():
            model(X)
        hook.remove()

    train(model, 0, 4, None if how == "never" else probe)
    return full_state(model)


def trained_after_passes_that_raised(folder: Path) -> list[dict[str, Tensor]]:
    return [trained_after_a_pass_that_raised(folder, how) for how in ("never", "merged", "moved")]


def test_pitfall_a_pass_that_raises_midway_leaves_fsdp2_gathered(folder: Path) -> None:
    for without, while_merged, while_moved in run_ranks(trained_after_passes_that_raised, 2, folder):
        assert equal(while_merged, without)
        assert equal(while_moved, without)


def nan_on_one_rank(folder: Path) -> str:
    model: Any = spread(expert(1), "fsdp2")
    live = LiveExpert(model, folder / "base")
    if Ranks.world().rank == 1:
        with torch.no_grad():
            local(model.layers[1].weight)[0, 0] = float("nan")
    before = local_bits(model)
    try:
        with MergedInPlace(live, None, peers(folder)):
            raise AssertionError
    except NonFiniteError as error:
        assert local_bits(model) == before
        return str(error)


def test_nan_on_one_rank_is_the_same_error_on_all(folder: Path) -> None:
    first, second = run_ranks(nan_on_one_rank, 2, folder)
    assert first == second
    assert "in this run" in first
    assert "layers.1.weight" in first


def peer_fails_on_one_rank(folder: Path) -> str:
    model: Any = spread(expert(1), "fsdp2")
    live = LiveExpert(model, folder / "base")
    (merged := MergedInPlace(live, None, peers(folder)))
    if Ranks.world().rank == 1:
        merged.vectors[1].flat = None  # type: ignore[method-assign, assignment]
    try:
        with merged:
            raise AssertionError
    except Exception as error:  # noqa: BLE001 - whatever was raised is what is looked at
        return f"{type(error).__name__}: {error}"


def test_a_failure_while_merging_on_one_rank_is_an_error_on_all(folder: Path) -> None:
    first, second = run_ranks(peer_fails_on_one_rank, 2, folder)
    assert first.startswith("MergeReadyError: rank 1 raised TypeError")
    assert second.startswith("TypeError")


def test_a_state_goes_around() -> None:
    assert equal(full_state(net_like(full_state(expert(1)))), full_state(expert(1)))
