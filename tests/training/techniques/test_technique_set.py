"""What the set does for its techniques: restoring, what cannot go together, and what a run has to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready import (
    DistilledFinish,
    DriftPenalty,
    MergeReadyLoop,
    NormGovernor,
    PlateauSchedule,
    Probe,
    Schedule,
    SharpnessAware,
    SimulatedMerge,
    SparseMask,
    WeightAverage,
)
from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.history import History
from mergeready.training.techniques.registry import make_technique, technique_names
from mergeready.training.techniques.technique import Technique
from mergeready.training.techniques.technique_set import TechniqueSet
from tests.sharded import adapter
from tests.training.histories import resumed_with_peers
from tests.training.small import Evaluation, Net, equal, examples, expert, state_of
from tests.training.techniques.every import masks
from tests.training.techniques.runs import net, run

ACTIVE: dict[str, Any] = {
    "drift_penalty": DriftPenalty(strength=0.5),
    "simulated_merge": SimulatedMerge(every=2, noise=0.05),
    "sharpness_aware": SharpnessAware(radius=0.1),
    "norm_governor": NormGovernor(max_norm=0.3),
}


@pytest.mark.parametrize("name", ["simulated_merge", "sharpness_aware"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_weights_are_restored_when_a_pass_raises(tmp_path: Path, name: str, where: str) -> None:
    model = expert(1)
    technique = {"simulated_merge": SimulatedMerge(every=1, noise=0.1), "sharpness_aware": SharpnessAware()}
    monitor = MergeReadyLoop(tmp_path, base=Net().state_dict(), techniques=[technique[name]])
    monitor.prepare(model)
    before, during = state_of(model), []
    x, y = examples(1, 0, 8)

    def step() -> None:
        for _ in monitor.passes():
            during.append(equal(state_of(model), before))
            loss = cross_entropy(model(x), y)
            if during[-1] is False and where == "forward":
                raise RuntimeError("out of memory")
            loss.backward()
            if during[-1] is False:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    assert during[-1] is False
    assert equal(state_of(model), before)


@pytest.mark.parametrize("name", ["drift_penalty", "simulated_merge", "sharpness_aware", "norm_governor"])
def test_a_lora_adapter_trains_with_it(tmp_path: Path, name: str) -> None:
    """Its frozen weights stay the base's, and the adapter moves otherwise than without."""
    ends = []
    for techniques in ([ACTIVE[name]], []):
        model = adapter(Net())
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        run(tmp_path / str(len(techniques)), techniques, model=model)
        now = dict(model.named_parameters())
        assert all(torch.equal(now[n], value) for n, value in frozen.items())
        ends.append({n: p.detach() for n, p in now.items() if "lora_" in n})
    assert not any(torch.equal(ends[0][n], ends[1][n]) for n in ends[0] if "lora_B" in n)


def test_conflicts_are_refused_with_their_reasons() -> None:
    with pytest.raises(OptionError) as caught:
        TechniqueSet([SimulatedMerge(), SharpnessAware(), DriftPenalty(), DriftPenalty()])
    message = str(caught.value)
    assert "simulated_merge and sharpness_aware both change the weights during forward" in message
    assert "drift_penalty is given twice" in message
    TechniqueSet([SimulatedMerge(), DriftPenalty(), WeightAverage(), PlateauSchedule(), NormGovernor()])


def test_names_and_settings() -> None:
    made = make_technique({"simulated_merge": {"every": 2}})
    assert made == SimulatedMerge(every=2)
    assert make_technique("weight_average") == WeightAverage()
    assert {"drift_penalty", "plateau_schedule", "sharpness_aware"} <= set(technique_names())
    with pytest.raises(OptionError, match="no technique 'sam'"):
        make_technique("sam")
    with pytest.raises(OptionError, match="no setting rho; it has radius"):
        make_technique({"sharpness_aware": {"rho": 1}})
    with pytest.raises(OptionError, match="must be a list"):
        TechniqueSet("sharpness_aware")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SimulatedMerge, {"scale": (1.0, 0.5)}),
        (SimulatedMerge, {"drop": 1.0}),
        (SimulatedMerge, {"noise": float("nan")}),
        (SimulatedMerge, {"every": -1}),
        (SharpnessAware, {"radius": -1.0}),
        (SharpnessAware, {"every": 0}),
        (WeightAverage, {"decay": 1.0}),
        (WeightAverage, {"kind": "median"}),
        (WeightAverage, {"mix": 0.0}),
        (NormGovernor, {"max_norm": 0.0}),
        (NormGovernor, {"grow": True, "max_norm": 1.0}),
        (PlateauSchedule, {"factor": 1.0}),
        (PlateauSchedule, {"patience": 0}),
        (PlateauSchedule, {"on": "base"}),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="`"):
        kind(**settings)


def test_what_a_run_lacks(tmp_path: Path) -> None:
    def prepare(technique: Any) -> None:
        model = net()
        optimizer = None if isinstance(technique, WeightAverage) else torch.optim.SGD(model.parameters())
        MergeReadyLoop(tmp_path, techniques=[technique]).prepare(model, optimizer=optimizer)

    with pytest.raises(OptionError, match="needs one optimizer"):
        prepare(WeightAverage())
    with pytest.raises(OptionError, match="give the run a `probe`"):
        prepare(PlateauSchedule())
    with pytest.raises(OptionError, match="`max_norm`, or peers"):
        prepare(NormGovernor())


def test_where_nothing_of_the_base_trains_there_is_nothing_to_act_on(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    model.head.requires_grad_(True)
    base = {name: value for name, value in net().state_dict().items() if "head" not in name}
    monitor = MergeReadyLoop(tmp_path, base=base, techniques=[DriftPenalty()])
    with pytest.raises(OptionError, match="no parameter that the base has trains"):
        monitor.prepare(model)


@pytest.mark.parametrize(("technique", "warns"), [(SharpnessAware(), True), (DriftPenalty(), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_may_swallow_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, technique: Any, warns: bool, dtype: torch.dtype
) -> None:
    model = net().to(dtype)
    MergeReadyLoop(tmp_path, base=state_of(model), techniques=[technique]).prepare(model)
    said = [r.getMessage() for r in caplog.records if "vanish in rounding" in r.getMessage()]
    assert bool(said) is (warns and dtype is torch.bfloat16)
    assert all("sharpness_aware" in message and "bfloat16" in message for message in said)


def test_a_step_in_parts_cannot_be_climbed(tmp_path: Path) -> None:
    monitor = MergeReadyLoop(tmp_path, techniques=[SharpnessAware()])
    monitor.prepare(net())
    with pytest.raises(UnsupportedError, match="all micro-batches of a step inside one"):
        next(monitor.passes(last=False))


def test_the_history_says_what_was_used(tmp_path: Path) -> None:
    monitor = MergeReadyLoop(tmp_path, techniques=[SimulatedMerge()])
    monitor.prepare(net())
    assert monitor.history.start is not None
    [used] = monitor.history.start.techniques
    assert used["technique"] == "simulated_merge"
    assert used["scale"] == [0.2, 1.0]


class Rates:
    """Learning rates that updates were made with, as the optimizer saw them."""

    def __init__(self, folder: Path, technique: Any, values: list[float]) -> None:
        self.seen: list[float] = []
        scores = iter([0.0, *values])  # the base first
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer.register_step_pre_hook(lambda *_: None)
        own = optimizer.param_groups[0]
        probe = Probe(
            evaluate=lambda model: {"score": next(scores)},
            scales=(1.0,),
            max_evaluations=1,
            schedule=Schedule(every=1),
        )
        peers = [state_of(expert(2))]
        monitor = MergeReadyLoop(folder, techniques=[technique], peers=peers, probe=probe)
        monitor.prepare(model, optimizer=optimizer)
        handle = optimizer.register_step_pre_hook(lambda *_: self.seen.append(own["lr"]))
        while not monitor.should_stop and monitor.steps < 20:
            optimizer.step()
            assert own["lr"] == 0.05
            monitor.step()
        handle.remove()
        self.monitor = monitor


def test_the_learning_rate_falls_on_a_plateau_and_then_the_run_stops(tmp_path: Path) -> None:
    expert_scores = [1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0]  # plateaus after steps 4 and 7
    values = [x for score in expert_scores for x in (score, 0.5)]  # each probe: the expert, then its merge
    rates = Rates(tmp_path, PlateauSchedule(patience=2, factor=0.1), values)
    assert rates.seen == pytest.approx([0.05] * 4 + [0.005] * 3)
    assert rates.monitor.steps == 7
    assert PlateauSchedule(patience=2)(rates.monitor.history).stop
    assert "plateau 2" in rates.monitor.history.decisions[-1].reason


def test_a_plateau_is_of_merges_with_the_same_peers() -> None:
    history = resumed_with_peers([0.9, 0.9], [0.5, 0.6, 0.7, 0.7, 0.7])
    schedule = PlateauSchedule(on="merged", patience=2)
    assert [schedule.plateaus(History(history[:length])) for length in (3, 5, 9, 10)] == [0, 0, 0, 1]
    # A plateau that was counted stays: the learning rate does not rise again.
    history = resumed_with_peers([0.9, 0.9, 0.9], [0.5, 0.6])
    assert schedule.plateaus(history) == 1


def test_probes_and_picks_see_the_average(tmp_path: Path) -> None:
    scores = []
    averages: list[Tensor] = []
    evaluation = Evaluation(1, "loss")

    def evaluate(model: Any) -> Any:
        scores.append(model.head.weight.detach().clone())
        return evaluation(model)

    probe = Probe(evaluate=evaluate, metric="loss", schedule=Schedule(every=6, geometric=False))

    def after(step: int, model: Any, monitor: MergeReadyLoop, optimizer: Any) -> None:
        held = (
            averages[-1] * 0.5 + model.head.weight.detach() * 0.5 if averages else model.head.weight.detach()
        )
        averages.append(held.clone())

    end = run(tmp_path, [WeightAverage(decay=0.5)], probe=probe, peers=[state_of(expert(2))], after=after)
    assert any(torch.allclose(seen, averages[-1], atol=1e-6) for seen in scores)
    assert not any(torch.equal(seen, run.before_the_end["head.weight"]) for seen in scores)  # type: ignore[attr-defined]
    assert torch.allclose(end["head.weight"], averages[-1], atol=1e-6)


@pytest.mark.parametrize("averages_first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "mean", "last"])
def test_what_is_averaged_is_held_already(tmp_path: Path, kind: Any, averages_first: bool) -> None:
    """In whatever order they are given: else the expert would be longer than allowed, or dense."""
    average, base = WeightAverage(kind=kind, decay=0.5, count=3), Net().state_dict()

    def end(folder: str, holding: Technique) -> dict[str, Tensor]:
        order = [average, holding] if averages_first else [holding, average]
        return run(tmp_path / folder, order, base=base)

    held = end("held", NormGovernor(max_norm=0.1))
    assert sum(float((held[name] - value).square().sum()) for name, value in base.items()) ** 0.5 < 0.1001
    masked = end("masked", SparseMask(masks=masks()))
    for name, mask in masks().items():
        assert torch.equal(masked[name][~mask], base[name][~mask])
    assert not equal(masked, base)


def test_an_end_that_raises_leaves_no_hooks(tmp_path: Path) -> None:
    def broken(model: Any, batch: Any) -> Tensor:
        raise RuntimeError("out of memory")

    finish = DistilledFinish(inputs=[examples(1, 0, 4)[0]], norm=0.1, forward=broken)
    model = expert(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    techniques = [finish, NormGovernor(max_norm=10.0)]
    monitor = MergeReadyLoop(tmp_path, base=Net(), techniques=techniques, difficulty=True, picks=None)
    monitor.prepare(model, optimizer=optimizer)
    assert optimizer._optimizer_step_post_hooks
    assert model._forward_hooks
    with pytest.raises(RuntimeError, match="out of memory"):
        monitor.finish()
    assert not optimizer._optimizer_step_post_hooks
    assert not model._forward_hooks


def test_a_second_end_changes_nothing(tmp_path: Path) -> None:
    """As where a loop finishes its run, and a `finally` does so again."""
    model = expert(1)
    monitor = MergeReadyLoop(
        tmp_path, base=Net(), techniques=[WeightAverage(kind="none", mix=0.5)], picks=None
    )
    monitor.prepare(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    before = state_of(model)
    monitor.finish()
    once = state_of(model)
    assert not equal(before, once)
    monitor.finish()
    assert equal(once, state_of(model))
