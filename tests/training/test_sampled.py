"""Estimates at every step: near the exact figures, in the history, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergeready import Monitor, NormBudget, Schedule
from mergeready.errors import NonFiniteError, OptionError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.history import History
from mergeready.training.measure import measure
from mergeready.training.peers import Peer, open_peers, open_sketches
from mergeready.training.records import MetricsRecord, SampledRecord
from mergeready.training.sampled import Sampler
from mergeready.training.settings import RunSettings
from tests.models import perturb
from tests.ranks import run_ranks
from tests.sharded import spread
from tests.tensor_watch import TensorWatch
from tests.training.small import Net, expert, save, state_of, train, train_on


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200), nn.Linear(200, 5))


def measured(budget: int) -> tuple[MetricsRecord, SampledRecord]:
    """Of a model with a peer, one that changes what does not train here too, and one known by fingerprint only."""
    base = state_of(wide())
    model = perturb(wide(), 1)
    model[2].requires_grad_(False)  # type: ignore[operator, index]
    model[2].load_state_dict(wide()[2].state_dict())  # type: ignore[operator, index]
    near = {name: value + 0.5 * (model.state_dict()[name] - value) for name, value in base.items()}
    far = state_of(perturb(wide(), 2))
    near["0.bias"] = base["0.bias"]
    opened = Base.open(base)
    shown = take_fingerprint(
        open_expert(state_of(perturb(wide(), 3)), opened).vector, opened, budget=20_000, label="seen"
    )
    live = LiveExpert(model, opened)
    peers = open_peers([Peer(near, name="near"), Peer(far, name="far")], live.base)
    sketched = open_sketches([shown], live.base)
    exact = measure(live, peers, 5, History(), sketched)
    return exact, Sampler(live, peers, sketched, budget=budget).measure(5)


def test_they_are_near_the_exact_figures() -> None:
    exact, found = measured(4000)
    assert 0 < found.norm_error < 0.02 * exact.norm
    assert abs(found.norm - exact.norm) < 3 * found.norm_error
    assert found.growth == pytest.approx(found.norm / 5)
    assert found.cosine.keys() == exact.cosine.keys() == {"near", "far", "seen"}
    assert exact.cosine["near"] > 0.9  # type: ignore[operator]
    for name in ("cosine", "sign_conflict"):
        for peer, value in getattr(found, name).items():
            error = getattr(found, f"{name}_error")[peer]
            known = getattr(exact, f"{name}_error").get(peer, 0.0)
            assert abs(value - getattr(exact, name)[peer]) <= 3 * error + 3 * known + 1e-9, (name, peer)
            assert error < 0.02


def test_all_coordinates_give_the_exact_figures() -> None:
    exact, found = measured(10**6)
    assert found.norm == pytest.approx(
        exact.norm, rel=0.02
    )  # the fingerprint's coordinates are all that there are
    whole = LiveExpert(perturb(wide(), 1), state_of(wide()))
    peers = open_peers([Peer(state_of(perturb(wide(), 2)), name="far")], whole.base)
    exact, found = measure(whole, peers, 1, History()), Sampler(whole, peers, budget=10**6).measure(1)
    assert (found.norm, found.norm_error) == (pytest.approx(exact.norm, rel=1e-6), 0.0)
    assert found.cosine["far"] == pytest.approx(exact.cosine["far"], abs=1e-6)
    assert found.sign_conflict == pytest.approx(exact.sign_conflict)
    assert found.cosine_error["far"] == pytest.approx(0, abs=1e-9)


def test_a_measurement_waits_no_more_often_for_more_parameters() -> None:
    waits = []
    for count in (2, 20):
        model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(count)))
        base = state_of(model)
        live = LiveExpert(perturb(model, 1), base)
        peers = open_peers(
            [Peer({name: value + 0.01 for name, value in base.items()}, name="law")], live.base
        )
        sampler = Sampler(live, peers)
        with TensorWatch() as watch:
            sampler.measure(1)
        waits.append(watch.waits)
    assert waits == [0, 0]


def monitor(folder: Path, **options: Any) -> Monitor:
    settings: dict[str, Any] = {"base": folder / "base", "peers": [Peer(folder / "peer", name="law")]}
    settings |= {"measure": Schedule(every=4), "sampled_every": 2}
    return Monitor(**(settings | options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(Net(), tmp_path / "base")
    save(expert(2), tmp_path / "peer")
    return tmp_path


def run(folder: Path, out: Path, steps: int = 8, **options: Any) -> Monitor:
    model, watching = Net(), monitor(folder, **options)
    watching.start(model, out, total_steps=8)
    train(model, 0, steps, watching.on_step)
    return watching


def test_they_stand_in_the_history_beside_the_exact_ones(folder: Path) -> None:
    seen = run(folder, folder / "run").history
    assert [(r.kind, r.step) for r in seen][1:6] == [
        ("metrics", 1),
        ("sampled", 2),
        ("metrics", 2),
        ("sampled", 4),
        ("metrics", 4),
    ]
    # Of so small a model every coordinate is looked at.
    exact = {record.step: record.norm for record in seen.metrics}
    assert [r.norm for r in seen.sampled if r.step in exact] == pytest.approx(
        [exact[step] for step in (2, 4, 8)]
    )
    assert seen.sampled[1].growth == pytest.approx((seen.sampled[1].norm - seen.sampled[0].norm) / 2)


def test_loggers_get_them_under_names_of_their_own(folder: Path) -> None:
    model, watching = Net(), monitor(folder)
    watching.start(model, folder / "run")
    outcomes: list[Any] = []
    train(model, 0, 6, lambda step: outcomes.append(watching.on_step(step)))
    names = {name.removeprefix("mergeready/") for name in outcomes[5].scalars}
    assert names == {"sampled/norm", "sampled/norm_error", "sampled/growth"} | {
        f"sampled/{figure}/law"
        for figure in ("cosine", "cosine_error", "sign_conflict", "sign_conflict_error")
    }
    assert {"mergeready/norm", "mergeready/sampled/norm"} <= outcomes[1].scalars.keys()
    assert not outcomes[2].scalars


def test_no_policy_acts_on_them(folder: Path) -> None:
    options = {"measure": Schedule(every=100, geometric=False), "stop": NormBudget(max_norm=1e-9)}
    watching = run(folder, folder / "run", steps=6, **options)
    assert len(watching.history.sampled) == 3
    assert not watching.history.decisions


def test_training_is_what_it_would_have_been_and_so_is_a_resumed_history(folder: Path) -> None:
    whole = run(folder, folder / "whole")
    model, first = Net(), monitor(folder)
    first.start(model, folder / "parts", total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train_on(model, optimizer, 0, 1, 5, first.on_step)
    second = monitor(folder)
    second.load_state_dict(first.state_dict())
    second.start(model, folder / "parts", step=5, total_steps=8)
    train_on(model, optimizer, 0, 6, 8, second.on_step)
    files = [(folder / name / "history.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    unwatched = train(Net(), 0, 8)
    assert all(
        torch.equal(value, unwatched.state_dict()[name]) for name, value in state_of(whole.live.model).items()
    )


def sampled_on_ranks(folder: Path) -> list[Any]:
    return [run_spread(folder, folder / layout, layout).history.to_json() for layout in ("ddp", "fsdp2")]


def run_spread(folder: Path, out: Path, layout: str) -> Monitor:
    model, watching = spread(expert(1), layout), monitor(folder, measure=Schedule(every=100, geometric=False))
    watching.start(model, out)
    watching.on_step(2)
    return watching


def test_ranks_find_what_one_process_finds(folder: Path) -> None:
    alone = monitor(folder, measure=Schedule(every=100, geometric=False))
    alone.start(expert(1), folder / "alone")
    alone.on_step(2)
    for found in run_ranks(sampled_on_ranks, 2, folder):
        assert found[0] == found[1]
        assert found[0][-1] == alone.history.to_json()[-1]


def test_a_model_that_diverged_is_an_error(folder: Path) -> None:
    model, watching = Net(), monitor(folder)
    watching.start(model, folder / "run")
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"head\.bias"):
        watching.on_step(2)


def test_settings() -> None:
    assert RunSettings.parse({"sampled_every": 5}).options()["sampled_every"] == 5
    with pytest.raises(OptionError, match="sampled_every"):
        RunSettings.parse({"sampled_every": 0})
    with pytest.raises(OptionError, match="`sampled_every` must be at least 1"):
        Monitor(sampled_every=0)
