"""A run of several ranks: one history, the same decisions everywhere, and one writer."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d

from mergeready.errors import EvaluationError, MergeReadyError, OptionError
from mergeready.merging.evaluation import Evaluate
from mergeready.training.history import read_history
from mergeready.training.monitor import Monitor
from mergeready.training.peers import Peer
from mergeready.training.picks import Picks
from mergeready.training.policies import MergedPlateau
from mergeready.training.probe import Probe
from mergeready.training.save import save_expert
from mergeready.training.schedule import Schedule
from mergeready.weights import SafetensorsFolder
from mergeready.weights.ranks import Ranks
from tests.ranks import run_ranks
from tests.sharded import adapter, full_state, local_bits, spread
from tests.training.small import Evaluation, Net, equal, expert, save, train
from tests.training.test_measure_sharded import flat

STEPS = 5


def monitor_of(folder: Path, **options: Any) -> Monitor:
    settings: dict[str, Any] = {
        "base": folder / "base",
        "peers": [Peer(folder / "peer", Evaluation(2), "law")],
        "probe": Probe(merge=["ties", "task_arithmetic"], evaluate=Evaluation(0), schedule=Schedule(every=2)),
        "measure": Schedule(every=1),
        "picks": Picks(pareto=2),
    }
    return Monitor(**(settings | options))


def run(
    layout: str | None, folder: Path, out: Path, probed: bool = True, kind: str = "full"
) -> dict[str, Any]:
    """A whole run; what this rank knows of it, and the weights that came out."""
    start = Net() if kind == "full" else adapter(Net())
    model = start if layout is None else spread(start, layout)
    options = {} if kind == "full" else {"base": None}
    monitor = monitor_of(folder, **options) if probed else None
    if monitor is not None:
        saving = lambda path: save_expert(model, path)  # noqa: E731
        monitor.start(model, out, total_steps=STEPS, save=saving)
    train(model, 0, STEPS, monitor.on_step if monitor is not None else None)
    found: dict[str, Any] = {"state": full_state(model)}
    if monitor is not None:
        found["summary"] = monitor.finish()
        found["history"] = monitor.state_dict()["history"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    save(Net(), path / "base")
    save(expert(2), path / "peer")
    return path


@pytest.mark.parametrize(
    ("layout", "kind", "size"),
    [
        ("ddp", "full", 2),
        ("fsdp2", "full", 2),
        ("fsdp2", "adapter", 2),
        pytest.param("tensor_parallel", "full", 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", "full", 4, marks=pytest.mark.slow),
        pytest.param("fsdp2_and_tensor_parallel", "full", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(
    layout: str, kind: str, size: int, folder: Path, tmp_path: Path
) -> None:
    """Every rank is given the same batches, so one process can be compared with."""
    alone = run(None, folder, tmp_path / "alone", kind=kind)
    results = run_ranks(run, size, layout, folder, tmp_path / "together", True, kind)
    unwatched = run_ranks(run, size, layout, folder, tmp_path / "unwatched", False, kind)
    for found in results:
        assert equal(found["state"], unwatched[0]["state"]), "probes left a trace"
        assert found["history"] == results[0]["history"]
        assert found["summary"] == results[0]["summary"]
        assert found["summary"]["picks"] == alone["summary"]["picks"]
        assert len(found["history"]) == len(alone["history"])
        for ours, theirs in zip(found["history"], alone["history"], strict=True):
            values, expected = dict(flat(ours)), dict(flat(theirs))
            assert values.keys() == expected.keys()
            for path, value in expected.items():
                assert values[path] == pytest.approx(value, rel=1e-5, abs=1e-6), (path, ours["step"])
    written = tmp_path / "together"
    assert read_history(written / "history.jsonl").to_json() == results[0]["history"]
    assert json.loads((written / "summary.json").read_text()) == results[0]["summary"]
    assert not (tmp_path / "unwatched").exists()
    for step in set(results[0]["summary"]["picks"].values()):
        picked = written / "picks" / f"step-{step:06}"
        theirs = tmp_path / "alone" / "picks" / f"step-{step:06}"
        name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
        ours, expected = SafetensorsFolder(picked / name), SafetensorsFolder(theirs / name)
        assert set(ours.infos) == set(expected.infos)
        for tensor in expected.infos:
            assert torch.allclose(ours.read(tensor), expected.read(tensor), atol=1e-5)


class Raises:
    """An evaluation that fails on the second rank at its third call: before, or after the pass through the model."""

    def __init__(self, when: str) -> None:
        self.when, self.calls, self.inner = when, 0, Evaluation(0)

    def __call__(self, model: nn.Module) -> Any:
        self.calls += 1
        fails = self.calls == 3 and Ranks.world().rank == 1
        if self.calls == 3 and self.when == "before":
            # What the other rank waits for in vain ends soon; nothing before it has to hurry.
            distributed_c10d._set_pg_timeout(timedelta(seconds=1))
            if fails:
                raise ValueError("only here")
        result = self.inner(model)
        if fails:
            raise ValueError("only here")
        return result


def failing(layout: str, when: str, folder: Path, out: Path) -> dict[str, Any]:
    model = spread(Net(), layout)
    probe = Probe(merge="ties", evaluate=Raises(when), schedule=Schedule(every=2))
    monitor = monitor_of(folder, probe=probe, peers=[folder / "peer"], picks=None)
    monitor.start(model, out)
    bits: dict[str, bytes] = {}

    def after(step: int) -> None:
        bits.update(local_bits(model))
        monitor.on_step(step)

    try:
        train(model, 0, STEPS, after)
    except EvaluationError as error:
        return {"message": str(error), "restored": local_bits(model) == bits}
    return {}


@pytest.mark.parametrize(("layout", "when"), [("ddp", "after"), ("fsdp2", "after"), ("fsdp2", "before")])
def test_an_evaluation_that_raises_on_one_rank_raises_on_all_and_the_weights_are_put_back(
    layout: str, when: str, folder: Path, tmp_path: Path
) -> None:
    """Before its pass, the other rank waits for it in the gathering of parameters: until the time-out of that group."""
    first, second = run_ranks(failing, 2, layout, when, folder, tmp_path)
    assert "ValueError: only here" in second["message"]
    assert "the evaluation of own raised" in first["message"]
    assert "rank 1 raised ValueError: only here" in first["message"] or when == "before"
    assert first["restored"]
    assert second["restored"]


def own_examples(model: nn.Module) -> dict[str, torch.Tensor]:
    """An evaluation that forgets to gather: each rank sees examples of its own."""
    values = Evaluation(0)(model)["accuracy"]
    return {"accuracy": values[Ranks.world().rank :: 2]}


def started(folder: Path, out: Path, layout: str, options: dict[str, Any]) -> str:
    try:
        monitor_of(folder, picks=None, **options).start(spread(Net(), layout), out)
    except MergeReadyError as error:
        return f"{type(error).__name__}: {error}"
    return "started"


def test_ranks_that_evaluate_other_examples_are_refused(folder: Path, tmp_path: Path) -> None:
    evaluate: Evaluate = own_examples
    options = {"probe": Probe(evaluate=evaluate)}
    for message in run_ranks(started, 2, folder, tmp_path, "ddp", options):
        assert message.startswith("EvaluationError")
        assert "on the ranks of this run" in message
        assert "gather the values" in message


def test_pitfall_a_sharded_model_is_no_base_unless_its_folder_is_known(folder: Path, tmp_path: Path) -> None:
    for message in run_ranks(started, 2, folder, tmp_path, "fsdp2", {"base": None}):
        assert message.startswith(OptionError.__name__)
        assert "Pass `base`" in message
    assert not (tmp_path / "base").exists()


def test_replicas_write_one_base(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(started, 2, folder, tmp_path, "ddp", {"base": None}) == ["started"] * 2
    written = SafetensorsFolder(tmp_path / "base")
    assert all(torch.equal(written.read(name), value) for name, value in Net().state_dict().items())


def slow_rank(folder: Path, out: Path) -> list[int]:
    """The second rank's clock runs elsewhere; a time budget must not make it probe at other steps."""
    import mergeready.training.monitor as module

    ticks = iter(range(10**6))
    factor = 1.0 if Ranks.world().rank == 0 else 50.0
    module.time.perf_counter = lambda: factor * next(ticks)  # type: ignore[attr-defined]
    probe = Probe(evaluate=Evaluation(0), schedule=Schedule(every=1, time_budget=0.3))
    monitor = monitor_of(folder, probe=probe, picks=None, stop=MergedPlateau(patience=2))
    model = spread(Net(), "ddp")
    monitor.start(model, out, total_steps=12)
    train(model, 0, 12, monitor.on_step)
    return [record.step for record in monitor.history.probes]


def test_ranks_measure_at_the_same_steps_whatever_their_clocks(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(slow_rank, 2, folder, tmp_path)
    assert first == second
    assert 0 < len(first) < 12
