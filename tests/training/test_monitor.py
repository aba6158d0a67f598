from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import (
    BaseMismatchError,
    EvaluationError,
    HistoryError,
    MismatchError,
    NonFiniteError,
    OptionError,
)
from mergeready.experts import open_expert
from mergeready.merging.evaluation import Score
from mergeready.training import monitor as monitor_module
from mergeready.training.history import History, read_history
from mergeready.training.monitor import Monitor, Outcome
from mergeready.training.peers import Peer
from mergeready.training.picks import Picks
from mergeready.training.policies import AllOf, AnyOf, Decision, ExpertPlateau, MergedPlateau, NormBudget
from mergeready.training.probe import Probe
from mergeready.training.records import MetricsRecord, StartRecord
from mergeready.training.save import save_expert
from mergeready.training.scalars import scalars
from mergeready.training.schedule import Schedule
from mergeready.training.techniques.plateau_schedule import PlateauSchedule
from tests.training.small import Evaluation, Net, OneNumber, equal, expert, near, state_of, train, train_on

ALWAYS = Schedule(every=1)


def quick_probe(**options: Any) -> Probe:
    settings: dict[str, Any] = {"merge": "ties", "evaluate": Evaluation(0), "schedule": Schedule(every=2)}
    return Probe(**(settings | options))


def watch(folder: Path, steps: int = 6, **settings: Any) -> tuple[Monitor, Net]:
    """A whole run under a monitor."""
    model = Net()
    save = settings.pop("save", lambda path: save_expert(model, path))
    monitor = Monitor(
        **({"base": Net(), "peers": [Peer(expert(1), name="law")], "measure": ALWAYS} | settings)
    )
    monitor.start(model, folder, total_steps=steps, save=save)
    train(model, 0, steps, monitor.on_step)
    monitor.finish()
    return monitor, model


class TestARun:
    def test_it_leaves_no_trace_in_training(self, tmp_path: Path) -> None:
        _, watched = watch(tmp_path, probe=quick_probe(schedule=ALWAYS), picks=Picks())
        assert equal(state_of(watched), state_of(expert(0, steps=6)))

    def test_what_is_recorded_when(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, probe=quick_probe())
        probed = {1, 2, 4, 6}
        wanted = [(kind, step) for step in range(1, 7) for kind in ("metrics", "probe")]
        wanted = [entry for entry in wanted if entry[0] == "metrics" or entry[1] in probed]
        assert [(record.kind, record.step) for record in monitor.history] == [("start", 0), *wanted]
        assert list(read_history(tmp_path / "history.jsonl")) == list(monitor.history)

    def test_the_last_step_is_measured_and_probed(self, tmp_path: Path) -> None:
        rarely = Schedule(every=4, geometric=False)
        monitor, _ = watch(tmp_path, probe=quick_probe(schedule=rarely), measure=rarely)
        assert [record.step for record in monitor.history.metrics] == [4, 6]
        assert [record.step for record in monitor.history.probes] == [4, 6]

    def test_the_first_record_says_what_is_compared_with_what(self, tmp_path: Path) -> None:
        own, law = Evaluation(0), Evaluation(1)
        peers = [Peer(expert(1), law, "law"), Peer(expert(2), name="code")]
        monitor, _ = watch(tmp_path, peers=peers, probe=quick_probe(evaluate=own, merge=["ties", "average"]))
        start = monitor.history.start
        assert start is not None
        assert start.base == monitor.live.base.identity.fingerprint
        assert start.peers == {peer.label: peer.norm for peer in monitor.peers}
        assert (start.surrogate, start.metric, start.greater_is_better) == (False, "accuracy", True)
        assert start.methods == [
            {"label": "ties", "method": "ties", "density": 0.2},
            {"label": "average", "method": "average"},
        ]
        assert start.references == {
            "own": {"base": own.mean(Net())},
            "law": {"base": law.mean(Net()), "expert": law.mean(expert(1))},
        }
        assert start.unmerged == []

    def test_only_measuring(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, picks=Picks())
        assert {type(record) for record in monitor.history} == {StartRecord, MetricsRecord}
        assert monitor.history.start == StartRecord(
            step=0, base=monitor.live.base.identity.fingerprint, peers={"law": monitor.peers[0].norm}
        )
        assert monitor.last_scalars() == scalars(monitor.history.metrics[-1])
        assert not (tmp_path / "picks").exists()

    def test_steps_that_are_taken_several_at_once_are_measured(self, tmp_path: Path) -> None:
        """As by Lightning's count where there are several optimizers: it may never meet a multiple of ``every``."""
        model = Net()
        every = Schedule(every=4, geometric=False)
        monitor = Monitor(base=Net(), measure=every, probe=quick_probe(schedule=every), sampled_every=4)
        monitor.start(model, tmp_path, total_steps=14)
        train(model, 0, 8, lambda step: monitor.on_step(2 * step - 1))
        assert [record.step for record in monitor.history.metrics] == [5, 9, 13, 15]
        assert [record.step for record in monitor.history.probes] == [5, 9, 13, 15]
        assert [record.step for record in monitor.history.sampled] == [5, 9, 13]

    @pytest.mark.parametrize(
        ("stop", "said"),
        [
            (MergedPlateau(), True),
            (PlateauSchedule(), True),
            (AnyOf(MergedPlateau(), ExpertPlateau()), True),
            (AllOf(MergedPlateau(), NormBudget(max_norm=1.0)), True),
            (AnyOf(MergedPlateau(), NormBudget(max_norm=1.0)), False),
            (NormBudget(max_norm=1.0), False),
        ],
    )
    def test_a_policy_that_can_never_stop_is_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, stop: Any, said: bool
    ) -> None:
        watch(tmp_path, stop=stop)
        assert ("it will never stop" in caplog.text) == said
        caplog.clear()
        watch(tmp_path, stop=stop, probe=quick_probe())
        assert "it will never stop" not in caplog.text

    def test_layers_that_are_unfrozen_on_the_way_are_followed(self, tmp_path: Path) -> None:
        seen: list[Tensor] = []

        def evaluate(model: nn.Module) -> dict[str, float]:
            seen.append(model.embed.weight.detach().clone())
            return {"score": 1.0}

        probe = quick_probe(
            merge="task_arithmetic", evaluate=evaluate, scales=(0.5,), max_evaluations=1, schedule=ALWAYS
        )
        monitor = Monitor(base=Net(), peers=[expert(1)], measure=ALWAYS, sampled_every=1, probe=probe)
        model = Net()
        model.embed.requires_grad_(False)
        model.layers[0].requires_grad_(False)
        monitor.start(model, tmp_path, total_steps=6, save=lambda path: save_expert(model, path))

        def after(step: int) -> None:
            monitor.on_step(step)
            if step == 3:
                model.requires_grad_(True)

        train_on(model, torch.optim.SGD(model.parameters(), lr=0.05), 0, 1, 6, after)
        base = state_of(Net())
        change = {name: value.double() - base[name].double() for name, value in state_of(model).items()}
        norm = math.sqrt(sum(float(value.square().sum()) for value in change.values()))
        assert change["embed.weight"].norm() > 0.01
        assert monitor.history.metrics[-1].norm == pytest.approx(norm)
        assert 0 in monitor.history.metrics[-1].layers
        assert monitor.history.sampled[-1].norm == pytest.approx(norm)  # so small a model is sampled whole
        peer = state_of(expert(1))["embed.weight"].double() - base["embed.weight"].double()
        expected = base["embed.weight"].double() + 0.5 * (change["embed.weight"] + peer)
        torch.testing.assert_close(seen[-1].double(), expected, atol=1e-6, rtol=1e-5)

    def test_without_peers_surrogates_stand_in(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, peers=[], probe=quick_probe())
        assert monitor.history.start is not None
        assert monitor.history.start.surrogate
        assert all(record.surrogate for record in monitor.history.probes)
        assert "mergeready/surrogate/ties" in monitor.last_scalars()

    def test_parameters_of_its_own_are_recorded_and_stay(self, tmp_path: Path) -> None:
        base = state_of(Net())
        del base["head.weight"], base["head.bias"]
        peer = state_of(expert(1))
        del peer["head.weight"], peer["head.bias"]
        monitor, model = watch(tmp_path, base=base, peers=[peer], probe=quick_probe())
        assert monitor.history.start is not None
        assert monitor.history.start.unmerged == ["head.weight", "head.bias"]
        assert equal(state_of(model), state_of(expert(0, steps=6)))

    def test_a_loss_should_fall(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, probe=quick_probe(evaluate=Evaluation(0, "loss")))
        assert monitor.history.sign == -1.0

    def test_outcomes_carry_the_scalars_of_the_step(self, tmp_path: Path) -> None:
        outcomes: dict[int, Outcome] = {}
        model = Net()
        monitor = Monitor(base=Net(), probe=quick_probe(), measure=Schedule(every=3, geometric=False))
        monitor.start(model, tmp_path, total_steps=6)
        train(model, 0, 6, lambda step: outcomes.update({step: monitor.on_step(step)}))
        names = {step: {name.split("/")[1] for name in outcome.scalars} for step, outcome in outcomes.items()}
        assert names[5] == set()
        assert "norm" in names[3]
        assert "expert" not in names[3]
        assert {"expert", "surrogate", "scale"} <= names[4]
        assert "norm" not in names[4]
        assert {"expert", "norm"} <= names[6]
        last = monitor.history.probes[-1]
        assert outcomes[6].scalars["mergeready/expert"] == last.expert.value
        assert monitor.last_scalars().items() <= outcomes[6].scalars.items()

    def test_the_frameworks_evaluation_and_metric_fill_in(self, tmp_path: Path) -> None:
        def both(model: nn.Module) -> dict[str, float]:
            return {"accuracy": 0.5, "f1": 0.25}

        model = Net()
        monitor = Monitor(base=Net(), probe=Probe(schedule=ALWAYS))
        monitor.start(model, tmp_path, evaluate=both, metric="f1")
        monitor.on_step(1)
        assert monitor.history.start is not None
        assert monitor.history.start.metric == "f1"
        assert monitor.history.probes[0].expert.value == 0.25

    def test_the_probes_own_evaluation_comes_first(self, tmp_path: Path) -> None:
        """The framework's metric does not belong to it, then."""
        monitor = Monitor(base=Net(), probe=quick_probe())
        monitor.start(Net(), tmp_path, evaluate=lambda model: {"f1": 1.0}, metric="f1")
        assert monitor.history.start is not None
        assert monitor.history.start.metric == "accuracy"


class TestProbeNow:
    def begin(self, folder: Path, own: Evaluation) -> tuple[Monitor, Net]:
        model = expert(0)
        probe = quick_probe(evaluate=own, schedule=Schedule(every=1000, geometric=False))
        monitor = Monitor(base=Net(), peers=[expert(1)], probe=probe, measure=Schedule(every=1000))
        monitor.start(model, folder, step=6)
        return monitor, model

    def test_outside_the_schedule(self, tmp_path: Path) -> None:
        monitor, _ = self.begin(tmp_path, Evaluation(0))
        assert monitor.on_step(7) == Outcome()
        outcome = monitor.probe_now(7)
        assert [record.step for record in monitor.history.probes] == [7]
        assert "mergeready/merged/ties" in outcome.scalars

    def test_a_step_is_probed_once(self, tmp_path: Path) -> None:
        own = Evaluation(0)
        monitor, _ = self.begin(tmp_path, own)
        monitor.probe_now(7)
        calls = own.calls
        assert monitor.probe_now(7) == Outcome()
        assert own.calls == calls

    def test_a_known_score_is_used(self, tmp_path: Path) -> None:
        monitor, _ = self.begin(tmp_path, Evaluation(0))
        monitor.probe_now(7, Score(0.125))
        assert monitor.history.probes[0].expert.value == 0.125

    def test_without_a_probe_it_does_nothing(self, tmp_path: Path) -> None:
        monitor = Monitor(base=Net())
        monitor.start(Net(), tmp_path)
        assert monitor.probe_now(1) == Outcome()


class TestStopping:
    def test_a_decision_is_noted_and_handed_on(self, tmp_path: Path) -> None:
        outcomes = []
        model = Net()
        monitor = Monitor(base=Net(), measure=ALWAYS, stop=NormBudget(max_norm=1e-6))
        monitor.start(model, tmp_path)
        train(model, 0, 1, lambda step: outcomes.append(monitor.on_step(step)))
        assert outcomes[0].decision.stop
        [decision] = monitor.history.decisions
        assert (decision.step, decision.acted) == (1, True)
        assert decision.reason == outcomes[0].decision.reason
        assert monitor.finish()["stopped"] == [{"step": 1, "reason": decision.reason, "acted": True}]

    def test_only_noting_it_notes_it_once(self, tmp_path: Path) -> None:
        outcomes = []
        model = Net()
        monitor = Monitor(base=Net(), measure=ALWAYS, stop=NormBudget(max_norm=1e-6), on_stop="record")
        monitor.start(model, tmp_path)
        train(model, 0, 4, lambda step: outcomes.append(monitor.on_step(step)))
        assert not any(outcome.decision.stop for outcome in outcomes)
        assert [(d.step, d.acted) for d in monitor.history.decisions] == [(1, False)]

    def test_policies_are_asked_when_there_is_something_new(self, tmp_path: Path) -> None:
        asked: list[int] = []

        def policy(history: History) -> Decision:
            asked.append(history[-1].step)
            return Decision(False, "never")

        watch(tmp_path, measure=Schedule(every=3, geometric=False), stop=policy)
        assert asked == [3, 6]

    def test_a_plateau_of_the_merged_metric(self, tmp_path: Path) -> None:
        """The expert goes on improving, away from where the merge is best."""
        model = OneNumber()
        probe = Probe(evaluate=near(1.5), schedule=ALWAYS, scales=(1.0,), max_evaluations=1)
        monitor = Monitor(
            base=OneNumber(), peers=[OneNumber(1.25)], probe=probe, stop=MergedPlateau(patience=2)
        )
        monitor.start(model, tmp_path)
        stopped = []
        for step, value in enumerate([1.125, 1.25, 1.375, 1.4375, 1.5], 1):
            with torch.no_grad():
                model.weight.fill_(value)
            stopped.append(monitor.on_step(step).decision.stop)
        assert [p.expert.value for p in monitor.history.probes] == [-0.375, -0.25, -0.125, -0.0625, 0.0]
        assert [value for _, value in monitor.history.merged("task_arithmetic")][1] == 0.0
        assert stopped == [False, False, False, True, True]


class Scripted:
    """An evaluation that gives the next number of a list at each call."""

    def __init__(self, *values: float) -> None:
        self._values = iter(values)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": next(self._values)}


def scripted_run(
    folder: Path, points: list[tuple[float, float]], picks: Picks, save: Callable[[Path], None] | None = None
) -> Monitor:
    """Probes at 1, 2, … with given expert and merged metrics."""
    numbers = [0.0, *(value for point in points for value in point)]
    probe = Probe(evaluate=Scripted(*numbers), schedule=ALWAYS, scales=(1.0,), max_evaluations=1)
    monitor = Monitor(base=Net(), peers=[expert(1)], probe=probe, picks=picks)
    model = expert(0)
    monitor.start(model, folder, save=save or (lambda path: save_expert(model, path)))
    for step in range(1, len(points) + 1):
        monitor.on_step(step)
    return monitor


class TestPicks:
    def index(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "picks" / "picks.json").read_text())

    def test_picks_open_as_experts_on_the_base(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, probe=quick_probe(), measure=ALWAYS, picks=Picks())
        kept = {step: state_of(expert(0, steps=step)) for step in range(1, 7)}
        index = self.index(tmp_path)
        assert set(index) == {"expert-best", "merge-best"}
        for pick in index.values():
            opened = open_expert(tmp_path / "picks" / pick["folder"], Net())
            assert opened.base_checked == "recorded"
            assert opened.statistics is not None
            for name, value in kept[pick["step"]].items():
                assert torch.equal(opened.statistics.read(name), value)
        assert monitor.finish()["picks"] == {label: pick["step"] for label, pick in index.items()}

    def test_a_pick_holds_the_weights_of_its_step_whatever_is_measured_later(self, tmp_path: Path) -> None:
        model = OneNumber()
        rarely = Schedule(every=3, geometric=False)
        probe = Probe(evaluate=near(1.5), schedule=rarely, scales=(1.0,), max_evaluations=1)
        monitor = Monitor(base=OneNumber(), probe=probe, picks=Picks(), measure=ALWAYS)
        save = lambda path: (path / "weight.txt").write_text(str(float(model.weight)))  # noqa: E731
        monitor.start(model, tmp_path, total_steps=9, save=save)
        for step in range(1, 6):
            with torch.no_grad():
                model.weight.fill_(1 + step / 8)
            monitor.on_step(step)
        [folder] = [path for path in (tmp_path / "picks").iterdir() if path.is_dir()]
        assert (folder.name, (folder / "weight.txt").read_text()) == ("step-000003", "1.375")

    def test_on_save_removes_what_is_not_picked_any_more(self, tmp_path: Path) -> None:
        monitor = scripted_run(tmp_path, [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], Picks())
        folders = lambda: sorted(p.name for p in (tmp_path / "picks").iterdir() if p.is_dir())  # noqa: E731
        assert folders() == ["step-000001", "step-000002", "step-000003"]
        monitor.on_save()
        assert folders() == ["step-000003"]

    def test_on_save_before_the_first_probe(self, tmp_path: Path) -> None:
        scripted_run(tmp_path, [], Picks()).on_save()
        assert not (tmp_path / "picks").exists()

    def test_the_summary_names_only_picks_whose_weights_exist(self, tmp_path: Path) -> None:
        """Third best at its time, step 3 was not saved; step 4 then leaves nothing else on the front beside itself."""
        points = [(0.5, 0.5), (0.6, 0.4), (0.9, 0.3), (0.7, 0.6)]
        monitor = scripted_run(tmp_path, points, Picks(expert_best=False, merge_best=False, pareto=2))
        assert monitor.finish()["picks"] == {"pareto-1": 4}
        assert {label: pick["step"] for label, pick in self.index(tmp_path).items()} == {"pareto-1": 4}

    def test_a_save_that_fails_stops_the_run_but_not_the_history(self, tmp_path: Path) -> None:
        def save(path: Path) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            scripted_run(tmp_path, [(0.1, 0.1)], Picks(), save)
        history = read_history(tmp_path / "history.jsonl")
        assert [record.kind for record in history] == ["start", "metrics", "probe"]
        assert not list((tmp_path / "picks").glob("*"))


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor_module, "time", clock)
    return clock


class TestTime:
    """One second a step; what evaluations cost is said."""

    def run(self, folder: Path, clock: Clock, cost: float, steps: int, schedule: Schedule) -> Monitor:
        def evaluate(model: nn.Module) -> dict[str, float]:
            clock.now += cost
            return {"accuracy": 0.5}

        probe = Probe(evaluate=evaluate, schedule=schedule, scales=(0.5,), max_evaluations=1)
        monitor = Monitor(base=Net(), peers=[expert(1)], probe=probe)
        monitor.start(expert(0), folder, total_steps=steps)
        for step in range(1, steps + 1):
            clock.now += 1.0
            monitor.on_step(step)
        return monitor

    def test_the_summary_tells_where_time_went(self, tmp_path: Path, clock: Clock) -> None:
        monitor = self.run(tmp_path, clock, cost=0.25, steps=8, schedule=ALWAYS)
        summary = monitor.finish()
        assert summary["seconds"] == {
            "measuring": 0.0,
            "probing": 0.25 + 8 * 0.5,  # the base once, then expert and merge at each step
            "training": pytest.approx(8.0),
        }
        assert summary["probes_skipped_for_time"] == 0
        assert json.loads((tmp_path / "summary.json").read_text()) == summary

    def test_probes_that_a_budget_does_not_afford_are_skipped_and_counted(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        schedule = Schedule(every=1, time_budget=0.2)
        monitor = self.run(tmp_path, clock, cost=0.5, steps=100, schedule=schedule)
        summary = monitor.finish()
        taken = len(monitor.history.probes)
        assert summary["seconds"]["probing"] == pytest.approx(0.5 + taken * 1.0)
        assert 15 <= taken <= 19
        assert summary["probes_skipped_for_time"] == 100 - taken

    def test_the_references_tell_what_the_first_probe_costs(self, tmp_path: Path, clock: Clock) -> None:
        """Too dear even once: not tried at all."""
        monitor = self.run(tmp_path, clock, cost=2.0, steps=10, schedule=Schedule(every=1, time_budget=0.5))
        assert monitor.history.probes == []
        assert monitor.finish()["probes_skipped_for_time"] == 10

    def test_setting_up_is_no_training_time(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Opening large peers takes a while; a budget is a share of what training takes."""

        def slowly(*arguments: Any, **named: Any) -> Any:
            clock.now += 1000.0
            return original(*arguments, **named)

        original = monitor_module.peers_of_run
        monkeypatch.setattr(monitor_module, "peers_of_run", slowly)
        monitor = self.run(tmp_path, clock, cost=2.0, steps=10, schedule=Schedule(every=1, time_budget=0.5))
        assert monitor.finish()["seconds"]["training"] == pytest.approx(10.0)
        assert monitor.history.probes == []


class Killed(Exception):
    """The process ends here."""


class TestResuming:
    """A run that is killed and resumed, against one that was not."""

    def run(
        self, folder: Path, last: int = 12, state: Mapping[str, Any] | None = None, kill_at: int | None = None
    ) -> tuple[Monitor, Net]:
        """Save after every fifth step; resume from the newest saved state if there is one."""
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        first = 0
        probe = Probe(
            merge=["ties", "average"], evaluate=Evaluation(0), schedule=Schedule(every=3), max_evaluations=5
        )
        peers = [Peer(expert(1), Evaluation(1), "law"), Peer(expert(2), name="code")]
        stop = MergedPlateau(patience=100)
        monitor = Monitor(
            peers=peers, probe=probe, stop=stop, measure=Schedule(every=2), picks=Picks(pareto=2)
        )
        if state is not None:
            first = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            monitor.load_state_dict(json.loads(state["monitor"]))
        monitor.start(model, folder, step=first, total_steps=last, save=lambda path: save_expert(model, path))

        def after(step: int) -> None:
            monitor.on_step(step)
            if step % 5 == 0:
                self.saved = {
                    "step": step,
                    "model": state_of(model),
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "monitor": json.dumps(monitor.state_dict(), sort_keys=True),
                }
                monitor.on_save()
            if step == kill_at:
                raise Killed

        train_on(model, optimizer, 0, first + 1, last, after)
        monitor.finish()
        return monitor, model

    @pytest.mark.parametrize("kill_at", [5, 6, 9, 11])
    def test_it_equals_an_uninterrupted_one(self, tmp_path: Path, kill_at: int) -> None:
        _, whole = self.run(tmp_path / "whole")
        with pytest.raises(Killed):
            self.run(tmp_path / "killed", kill_at=kill_at)
        _, resumed = self.run(tmp_path / "killed", state=self.saved)
        assert equal(state_of(whole), state_of(resumed))
        files = {
            name: {p.relative_to(tmp_path / name): p for p in (tmp_path / name).rglob("*") if p.is_file()}
            for name in ("whole", "killed")
        }
        uneven = {Path("summary.json"), Path("history.superseded.jsonl")}
        assert files["whole"].keys() - uneven == files["killed"].keys() - uneven
        for path in files["whole"].keys() - uneven:
            assert files["whole"][path].read_bytes() == files["killed"][path].read_bytes(), path

    def test_a_base_that_was_not_given_is_found_again(self, tmp_path: Path) -> None:
        first, _ = self.run(tmp_path, last=5)
        again, _ = self.run(tmp_path, state=self.saved)
        assert again.live.base.identity == first.live.base.identity
        start = state_of(Net())
        assert all(torch.equal(again.live.base.source.read(name), value) for name, value in start.items())

    def test_nothing_is_noted_when_nothing_changed(self, tmp_path: Path) -> None:
        self.run(tmp_path, last=5)
        again, _ = self.run(tmp_path, state=self.saved)
        assert [record.kind for record in again.history].count("start") == 1
        assert not [record for record in again.history if record.kind == "resume"]


class TestChangesOnResume:
    def state(self, folder: Path) -> dict[str, Any]:
        monitor, self.model = watch(folder, probe=quick_probe(), steps=4)
        return json.loads(json.dumps(monitor.state_dict(), sort_keys=True))

    def resume(self, folder: Path, state: Mapping[str, Any], **settings: Any) -> Monitor:
        settings = {"base": Net(), "peers": [Peer(expert(1), name="law")], "probe": quick_probe()} | settings
        monitor = Monitor(**settings)
        monitor.load_state_dict(state)
        monitor.start(self.model, folder, step=4)
        return monitor

    @pytest.mark.parametrize(
        ("settings", "changed"),
        [
            ({}, None),
            ({"peers": [Peer(expert(2), name="law")]}, {"peers"}),
            ({"peers": []}, {"peers", "surrogate"}),
            ({"probe": quick_probe(merge=["ties", "average"])}, {"methods"}),
            (
                {"probe": quick_probe(evaluate=Evaluation(0, "loss"))},
                {"metric", "greater_is_better", "references"},
            ),
        ],
    )
    def test_they_are_recorded(self, tmp_path: Path, settings: Any, changed: set[str] | None) -> None:
        state = self.state(tmp_path)
        monitor = self.resume(tmp_path, state, **settings)
        added = list(monitor.history)[len(state["history"]) :]
        if changed is None:
            assert added == []
        else:
            resumed, start = added
            assert (resumed.kind, resumed.step, set(resumed.changed)) == ("resume", 4, changed)
            assert isinstance(start, StartRecord)
            assert start.step == 4

    def test_another_base_is_refused(self, tmp_path: Path) -> None:
        state = self.state(tmp_path)
        other = Net()
        with torch.no_grad():
            other.embed.weight *= 1.001
        with pytest.raises(HistoryError, match="started from another base"):
            self.resume(tmp_path, state, base=other, peers=[])

    def test_a_history_from_the_future_is_refused(self, tmp_path: Path) -> None:
        state = self.state(tmp_path)
        monitor = Monitor(base=Net())
        monitor.load_state_dict(state)
        with pytest.raises(HistoryError, match="goes beyond step 3, where the run resumes"):
            monitor.start(self.model, tmp_path, step=3)

    def test_a_new_run_in_an_old_folder_begins_anew(self, tmp_path: Path) -> None:
        self.state(tmp_path)
        old = (tmp_path / "history.jsonl").read_bytes()
        monitor, _ = watch(tmp_path, steps=2)
        assert list(read_history(tmp_path / "history.jsonl")) == list(monitor.history)
        assert (tmp_path / "history.superseded.jsonl").read_bytes().count(b"\n") == old.count(b"\n")


class TestState:
    def test_it_is_json_and_holds_the_history_alone(self, tmp_path: Path) -> None:
        monitor, _ = watch(tmp_path, probe=quick_probe())
        state = monitor.state_dict()
        assert set(state) == {"version", "history"}
        assert list(History.from_json(json.loads(json.dumps(state))["history"])) == list(monitor.history)

    @pytest.mark.parametrize("version", [0, 2, None, "1"])
    def test_another_version(self, version: object) -> None:
        with pytest.raises(HistoryError, match=f"has version {version}, not 1"):
            Monitor().load_state_dict({"version": version, "history": []})

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"version": 1}, "holds no history"),
            ({"version": 1, "history": None}, "holds no history"),
            ({"version": 1, "history": "start"}, "holds no history"),
            ({"version": 1, "history": [{"kind": "epoch"}]}, "cannot be understood"),
        ],
    )
    def test_a_damaged_one(self, state: dict[str, Any], message: str) -> None:
        with pytest.raises(HistoryError, match=message):
            Monitor().load_state_dict(state)

    def test_an_empty_one(self, tmp_path: Path) -> None:
        """Saved before the first record of a run that began without a monitor."""
        monitor = Monitor(base=Net())
        monitor.load_state_dict({"version": 1, "history": []})
        monitor.start(expert(0), tmp_path, step=3)
        assert [record.step for record in monitor.history] == [3]


class TestErrors:
    @pytest.mark.parametrize("peers", ["path", Path("path"), Peer("path"), {"weight": torch.ones(1)}, Net()])
    def test_a_single_peer(self, peers: Any) -> None:
        with pytest.raises(OptionError, match="put a single one into a list"):
            Monitor(peers=peers)

    def test_on_stop(self) -> None:
        with pytest.raises(OptionError, match="`on_stop` must be 'stop' or 'record', not 'pause'"):
            Monitor(on_stop="pause")  # type: ignore[arg-type]

    @pytest.mark.parametrize("measure", [None, 100])
    def test_measuring_needs_a_schedule(self, measure: Any) -> None:
        with pytest.raises(
            OptionError, match=rf"`measure` must be a Schedule, .*, not {measure}\. Measuring cannot"
        ):
            Monitor(measure=measure)

    def test_picks_need_a_way_to_save(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="`picks` needs a way to save the model"):
            Monitor(base=Net(), probe=quick_probe(), picks=Picks()).start(Net(), tmp_path)

    def test_a_probe_needs_an_evaluation(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="the probe needs `evaluate`"):
            Monitor(base=Net(), probe=Probe()).start(Net(), tmp_path)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"base": Net(seed=5)}, BaseMismatchError, "does not descend from"),
            ({"peers": [Net(seed=5)]}, BaseMismatchError, "does not descend from"),
            ({"probe": quick_probe(metric="f1")}, EvaluationError, "returned no 'f1'"),
        ],
    )
    def test_before_anything_is_written(
        self, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        model = expert(0)
        before = state_of(model)
        with pytest.raises(error, match=message):
            Monitor(**({"base": Net()} | settings)).start(model, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert equal(before, state_of(model))

    def test_a_peer_that_changes_nothing_the_model_has(self, tmp_path: Path) -> None:
        base = {**state_of(Net()), "other.weight": torch.ones(3)}
        peer = {**base, "other.weight": torch.zeros(3)}
        with pytest.raises(MismatchError, match=r"changes no parameter of the model: other\.weight"):
            Monitor(base=base, peers=[peer]).start(Net(), tmp_path)

    def test_a_diverged_model(self, tmp_path: Path) -> None:
        model = expert(0)
        monitor = Monitor(base=Net(), measure=ALWAYS)
        monitor.start(model, tmp_path)
        with torch.no_grad():
            model.head.bias[0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"head\.bias"):
            monitor.on_step(1)
        assert [record.kind for record in read_history(tmp_path / "history.jsonl")] == ["start"]

    def test_a_failing_evaluation_says_when_and_puts_the_weights_back(self, tmp_path: Path) -> None:
        own, fails = Evaluation(0), [False]

        def sometimes(model: nn.Module) -> dict[str, Tensor]:
            if fails[0] and not equal(state_of(model), before):
                raise RuntimeError("lost connection")
            return own(model)

        model = expert(0)
        before = state_of(model)
        probe = quick_probe(evaluate=sometimes, schedule=ALWAYS)
        monitor = Monitor(base=Net(), peers=[expert(1)], probe=probe)
        monitor.start(model, tmp_path)
        fails[0] = True
        with pytest.raises(EvaluationError, match="lost connection") as raised:
            monitor.on_step(7)
        assert raised.value.__notes__ == ["while probing at step 7; the weights were put back"]
        assert equal(before, state_of(model))
        assert monitor.history.probes == []
        fails[0] = False
        monitor.on_step(8)
        assert [record.step for record in monitor.history.probes] == [8]

    def test_a_base_of_zeros_does_not_end_a_run(self, tmp_path: Path) -> None:
        """The relative norm has no value there, and a history must not hold what JSON cannot."""
        base, model = Net(), Net()
        with torch.no_grad():
            base.head.bias.zero_()
            model.head.bias.zero_()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name == "head.bias"
        monitor = Monitor(base=base, measure=ALWAYS)
        monitor.start(model, tmp_path)
        train(model, 0, 2, monitor.on_step)
        assert [record.relative_norm for record in read_history(tmp_path / "history.jsonl").metrics] == [
            None
        ] * 2
