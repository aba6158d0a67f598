"""On several ranks, however the model is spread over them, the figures are those of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergeready.errors import BaseMismatchError, NonFiniteError
from mergeready.experts import Base, LiveExpert
from mergeready.training.history import History
from mergeready.training.measure import measure
from mergeready.training.peers import Peer, open_peers
from mergeready.weights.ranks import Ranks
from mergeready.weights.safetensors_folder import SafetensorsFolder
from mergeready.weights.shards import local
from tests.ranks import run_ranks
from tests.sharded import ON_FOUR, ON_TWO, adapter, spread
from tests.training.small import Net, expert, save, state_of

ADAPTED = ("ddp", "fsdp2", "hsdp")


def in_training(kind: str) -> nn.Module:
    return expert(1) if kind == "full" else adapter(Net())


def figures(model: nn.Module, folder: Path, given: bool, ranks: Ranks | None = None) -> dict[str, Any]:
    base = Base.open(folder / "base")
    live = LiveExpert(model, base if given else None, ranks)
    with live.base_readable():
        peers = open_peers(
            [Peer(folder / "peer", name="law"), Peer(adapted_peer(base), name="code")], live.base
        )
    return asdict(measure(live, peers, 20, History()))


def adapted_peer(base: Base) -> Any:
    return LiveExpert(adapter(Net(), seed=5), base).vector


def figures_of(layouts: tuple[str, ...], kind: str, folder: Path) -> dict[str, Any]:
    found = {}
    for layout in layouts:
        for given in (True, False) if kind == "adapter" else (True,):
            model = spread(in_training(kind), layout)
            found[layout, given] = figures(model, folder, given, Ranks.world())
    return found


def flat(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(record, dict | list | tuple):
        items = record.items() if isinstance(record, dict) else enumerate(record)
        for key, value in items:
            yield from flat(value, f"{path}/{key}")
    elif not isinstance(record, str | None):
        yield path, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    save(Net(), path / "base")
    save(expert(2), path / "peer")
    return path


@pytest.mark.parametrize(
    ("size", "kind", "layouts"),
    [
        (2, "full", ON_TWO),
        (2, "adapter", ADAPTED[:2]),
        pytest.param(4, "full", ON_FOUR, marks=pytest.mark.slow),
        pytest.param(4, "adapter", ADAPTED, marks=pytest.mark.slow),
    ],
)
def test_the_figures_are_those_of_one_process(
    folder: Path, size: int, kind: str, layouts: tuple[str, ...]
) -> None:
    alone = dict(flat(figures(in_training(kind), folder, given=True)))
    results = run_ranks(figures_of, size, layouts, kind, folder)
    assert all(found == results[0] for found in results[1:]), "ranks disagree"
    for key, record in results[0].items():
        together = dict(flat(record))
        assert together.keys() == alone.keys(), key
        for path, value in alone.items():
            assert together[path] == pytest.approx(value, rel=1e-6, abs=1e-9), (key, path)
    assert alone["/norm"] > 0
    assert alone["/cosine/law"] != 0


def local_norms(folder: Path) -> dict[str, float]:
    model = spread(expert(1), "fsdp2")
    start = spread(Net(), "fsdp2")
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    naive = sum(float((local(a) - local(b)).double().square().sum()) for a, b in pairs) ** 0.5
    right = measure(LiveExpert(model, folder / "base"), [], 1, History()).norm
    return {"naive": naive, "right": right}


def test_pitfall_the_norm_of_what_a_rank_holds_is_not_the_norm(folder: Path) -> None:
    alone = measure(LiveExpert(expert(1), folder / "base"), [], 1, History()).norm
    for found in run_ranks(local_norms, 2, folder):
        assert found["naive"] < 0.95 * alone
        assert found["right"] == pytest.approx(alone, rel=1e-6)


def elements_read(folder: Path) -> int:
    count = 0
    original = SafetensorsFolder.read_flat

    def counting(self: SafetensorsFolder, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal count
        count += stop - start
        return original(self, name, start, stop)

    base = Base.open(folder / "base")
    live = LiveExpert(spread(expert(1), "fsdp2"), base)
    peers = open_peers([Peer(folder / "peer")], base)
    SafetensorsFolder.read_flat = counting  # type: ignore[method-assign]
    measure(live, peers, 1, History())
    return count


def test_a_rank_reads_what_it_holds_of_base_and_peers_and_no_more(folder: Path) -> None:
    numbers = sum(p.numel() for p in Net().parameters())
    assert sum(run_ranks(elements_read, 2, folder)) == 2 * numbers  # once of the base, once of the peer


def failures(folder: Path) -> dict[str, str]:
    found = {}
    model: Any = spread(expert(1), "fsdp2")
    try:
        LiveExpert(model, copy.deepcopy(Net(seed=9)))
    except BaseMismatchError as error:
        found["other base"] = str(error)
    live = LiveExpert(model, folder / "base")
    if Ranks.world().rank == 1:
        with torch.no_grad():
            local(model.layers[1].weight)[0, 0] = float("nan")
    try:
        measure(live, [], 1, History())
    except NonFiniteError as error:
        found["nan"] = str(error)
    return found


def test_what_is_wrong_on_one_rank_is_an_error_on_all(folder: Path) -> None:
    first, second = run_ranks(failures, 2, folder)
    assert first == second
    assert "does not descend" in first["other base"]
    assert "layers.1.weight" in first["nan"]


def test_pitfall_fully_shard_renames_the_class_of_a_peft_model(folder: Path) -> None:
    """PEFT models are known by where their class comes from."""
    renamed = adapter(Net())
    renamed.__class__ = type("FSDPPeftModel", (type(renamed),), {"__module__": "torch.distributed.fsdp"})
    assert LiveExpert(renamed, None).is_peft
    assert state_of(renamed)
