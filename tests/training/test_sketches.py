"""Runs beside peers of which only fingerprints are known."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError, MismatchError, OptionError, UnsupportedError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.history import History, read_history
from mergeready.training.measure import measure
from mergeready.training.monitor import Monitor
from mergeready.training.peers import Peer, open_peers, open_sketches
from mergeready.training.probe import Probe
from mergeready.training.records import MetricsRecord
from mergeready.training.schedule import Schedule
from mergeready.weights.ranks import Ranks
from tests.ranks import run_ranks
from tests.sharded import spread
from tests.training.small import Evaluation, Net, expert, save, train

Weights = dict[str, Tensor]


def taken(task: int, budget: int = 2**18, *, label: str = "law", base: Net | None = None) -> Fingerprint:
    opened = Base.open(base or Net())
    return take_fingerprint(open_expert(expert(task), opened).vector, opened, label=label, budget=budget)


def against(model: torch.nn.Module, base: Base, *prints: Fingerprint) -> MetricsRecord:
    return measure(LiveExpert(model, base), [], 5, History(), open_sketches(prints, base))


def test_complete_samples_give_the_exact_figures() -> None:
    base = Base.open(Net())
    model = expert(0)
    exact = measure(LiveExpert(model, base), open_peers([Peer(expert(1), name="law")], base), 5, History())
    found = against(model, base, taken(1))
    assert found.cosine["law"] == pytest.approx(exact.cosine["law"], abs=2e-3)  # bf16 in fingerprints
    assert found.sign_conflict["law"] == pytest.approx(exact.sign_conflict["law"], abs=1e-9)
    assert found.norm_ratio == pytest.approx(exact.norm_ratio)
    assert (found.cosine_error, found.sign_conflict_error) == ({"law": 0.0}, {"law": 0.0})


def wide(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.weight": torch.randn(200, 300, generator=generator) for i in range(3)}


class Wide(torch.nn.Sequential):
    def __init__(self, state: Weights) -> None:
        super().__init__(*(torch.nn.Linear(300, 200, bias=False) for _ in state))
        self.load_state_dict(state)


def moved(start: Weights, seed: int) -> Weights:
    common, own = wide(77), wide(seed)
    return {n: w + 1e-3 * (0.4 * common[n] + 0.6 * own[n]) for n, w in start.items()}


def test_few_coordinates_give_estimates_within_their_errors() -> None:
    """Ten peers, of samples of two sizes; the truth lies within three stated errors for all, which are not wide."""
    start = wide(0)
    base = Base.open(start)
    model, others = Wide(moved(start, 1)), {f"p{i}": moved(start, 10 + i) for i in range(10)}
    prints = [
        take_fingerprint(open_expert(state, base).vector, base, label=name, budget=2000 + 3000 * (i % 2))
        for i, (name, state) in enumerate(others.items())
    ]
    found = against(model, base, *prints)
    own = torch.cat([(model.state_dict()[n] - start[n]).double().reshape(-1) for n in start])
    for name, state in others.items():
        other = torch.cat([(state[n] - start[n]).double().reshape(-1) for n in start])
        cosine = float(own @ other / own.norm() / other.norm())
        conflict = float((own.sign() != other.sign()).double().mean())
        for value, error, exact in (
            (found.cosine[name], found.cosine_error[name], cosine),
            (found.sign_conflict[name], found.sign_conflict_error[name], conflict),
        ):
            assert value is not None
            assert error is not None
            assert 0 < error < 0.03
            assert abs(value - exact) < 3 * error, name


def test_an_untrained_model_has_no_direction() -> None:
    found = against(Net(), Base.open(Net()), taken(1))
    assert (found.cosine, found.cosine_error) == ({"law": None}, {"law": None})
    assert found.norm_ratio is None


def on_ranks(folder: Path) -> dict[str, float | None]:
    base = Base.open(folder)
    live = LiveExpert(spread(expert(0), "fsdp2"), base, Ranks.world())
    found = measure(live, [], 5, History(), open_sketches([taken(1, budget=300)], base))
    return {**found.cosine, "error": found.cosine_error["law"], "conflict": found.sign_conflict["law"]}


def test_ranks_put_the_sample_together(tmp_path: Path) -> None:
    base = Base.open(save(Net(), tmp_path / "base"))
    alone = against(expert(0), base, taken(1, budget=300))
    wanted = {"law": alone.cosine["law"], "error": alone.cosine_error["law"]}
    wanted["conflict"] = alone.sign_conflict["law"]
    assert alone.cosine_error["law"]
    for found in run_ranks(on_ranks, 2, tmp_path / "base"):
        assert found == pytest.approx(wanted, abs=1e-6)


def watch(folder: Path, peers: list[object]) -> Monitor:
    monitor = Monitor(
        base=Net(),
        peers=peers,  # type: ignore[arg-type]
        measure=Schedule(every=1),
        probe=Probe(evaluate=Evaluation(0), schedule=Schedule(every=2)),
    )
    model = Net()
    monitor.start(model, folder, total_steps=3)
    train(model, 0, 3, monitor.on_step)
    monitor.finish()
    return monitor


def test_a_run_beside_fingerprints_alone_probes_with_surrogates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = taken(1).save(tmp_path / "law.fingerprint.safetensors")
    with caplog.at_level(logging.INFO, "mergeready"):
        monitor = watch(tmp_path / "run", [str(path), Peer(taken(2), name="code")])
    assert "measured, not merged: law, code; probes use surrogates" in caplog.text
    start = monitor.history.start
    assert start is not None
    assert (start.fingerprints, start.surrogate) == (["law", "code"], True)
    assert start.peers["law"] == pytest.approx(taken(1).norm)
    assert all(probe.surrogate for probe in monitor.history.probes)
    assert set(monitor.history.metrics[-1].cosine) == {"law", "code"}
    assert list(read_history(tmp_path / "run" / "history.jsonl")) == list(monitor.history)
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[0])["fingerprints"]


def test_probes_merge_the_peers_that_have_weights(tmp_path: Path) -> None:
    monitor = watch(tmp_path / "both", [Peer(expert(1), name="math"), taken(2)])
    other = watch(tmp_path / "one", [Peer(expert(1), name="math")])
    assert monitor.history.probes == other.history.probes
    assert not monitor.history.probes[0].surrogate
    assert set(monitor.history.metrics[-1].cosine) == {"math", "law"}
    assert set(monitor.history.metrics[-1].cosine_error) == {"law"}


def test_what_is_refused(tmp_path: Path) -> None:
    base = Base.open(Net())
    with pytest.raises(BaseMismatchError, match="fingerprint law was made for another base"):
        open_sketches([taken(1)], Base.open(Net(seed=4)))
    with pytest.raises(OptionError, match="peer law is a fingerprint, and evaluating"):
        open_sketches([Peer(taken(1), Evaluation(1))], base)
    with pytest.raises(OptionError, match="are called law"):
        watch(tmp_path / "run", [Peer(expert(2), name="law"), taken(1)])
    strange = taken(1)
    shapes = {**strange.shapes, "head.bias": (5,)}
    with pytest.raises(MismatchError, match=r"these names and shapes: head\.bias"):
        open_sketches([Fingerprint(**{**vars(strange), "shapes": shapes})], base)
    path = taken(1).save(tmp_path / "law.fingerprint.safetensors")
    with pytest.raises(UnsupportedError, match="is a fingerprint: it holds no weights"):
        open_expert(path, base)
