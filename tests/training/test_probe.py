from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import EvaluationError, OptionError
from mergeready.experts import LiveExpert
from mergeready.merging import make_method, merge
from mergeready.merging.evaluation import Score
from mergeready.training.history import History
from mergeready.training.peers import Peer, open_peers
from mergeready.training.probe import Probe, Prober
from mergeready.training.records import ProbeRecord, TaskResult
from mergeready.training.references import measure_references
from mergeready.training.surrogates import Surrogates, synthetic_peers
from tests.training.histories import start
from tests.training.small import Evaluation, Net, OneNumber, equal, expert, loaded, near, state_of


def make_prober(model: nn.Module, base: nn.Module, peers: Sequence[Any], probe: Probe) -> Prober:
    live = LiveExpert(model, base)
    opened = open_peers(peers, live.base)
    assert probe.evaluate is not None
    references, metric = measure_references(live, opened, probe.evaluate, probe.metric)
    return Prober(probe, live, opened, probe.evaluate, metric, references)


def begin(probe: Probe, greater: bool = True) -> History:
    return History([start(*probe.methods, greater=greater)])


class TestAgainstMergingByHand:
    """A probe's numbers, against merged state dicts that are loaded and evaluated outside of it."""

    METHODS = ("ties", "task_arithmetic", "average", "dare_linear")

    @pytest.fixture(params=["accuracy", "loss"])
    def metric(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def tasks(self, metric: str) -> dict[str, Evaluation]:
        return {"own": Evaluation(0, metric), "law": Evaluation(1, metric)}

    @pytest.fixture
    def states(self) -> dict[str, dict[str, Tensor]]:
        return {"own": state_of(expert(0)), "law": state_of(expert(1)), "silent": state_of(expert(2))}

    @pytest.fixture
    def record(
        self, metric: str, tasks: dict[str, Evaluation], states: dict[str, dict[str, Tensor]]
    ) -> ProbeRecord:
        probe = Probe(merge=self.METHODS, evaluate=tasks["own"], weights=[1.0, 0.5, 2.0])
        peers = [Peer(states["law"], tasks["law"], "law"), Peer(states["silent"], name="silent")]
        model = loaded(states["own"]).train()
        prober = make_prober(model, Net(), peers, probe)
        random = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found = prober.run(17, begin(probe, greater=metric == "accuracy"))
        assert equal(states["own"], state_of(model))
        assert all(module.training for module in model.modules())
        assert torch.equal(random[0], torch.get_rng_state())
        assert random[1] == np.random.get_state()[1].tolist()
        return found

    def test_the_expert(
        self, record: ProbeRecord, tasks: dict[str, Evaluation], states: dict[str, dict[str, Tensor]]
    ) -> None:
        assert (record.step, record.surrogate, record.alone) == (17, False, {})
        assert record.expert.value == tasks["own"].mean(loaded(states["own"]))
        assert record.expert.n == 40
        assert record.expert.low is not None
        assert record.expert.high is not None
        assert record.expert.low < record.expert.value < record.expert.high

    @pytest.mark.parametrize("method", METHODS)
    def test_every_scale(
        self,
        method: str,
        metric: str,
        record: ProbeRecord,
        tasks: dict[str, Evaluation],
        states: dict[str, dict[str, Tensor]],
    ) -> None:
        result = record.merges[method]
        best = max if metric == "accuracy" else min
        by_scale: dict[float, list[float]] = {}
        for scale, mean in result.tried:
            merged = merge(
                state_of(Net()), list(states.values()), method, scale=scale, weights=[1.0, 0.5, 2.0]
            )
            by_scale[scale] = [evaluate.mean(loaded(merged)) for evaluate in tasks.values()]
            assert mean == np.mean(by_scale[scale])
        assert {0.3, 0.5, 0.8} <= set(by_scale)
        assert result.merged == best(mean for _, mean in result.tried)
        assert result.merged == np.mean(by_scale[result.scale])
        assert [task.merged.value for task in result.tasks.values()] == by_scale[result.scale]

    @pytest.mark.parametrize("method", METHODS)
    def test_what_it_is_compared_with(
        self,
        method: str,
        record: ProbeRecord,
        tasks: dict[str, Evaluation],
        states: dict[str, dict[str, Tensor]],
    ) -> None:
        result = record.merges[method]
        assert list(result.tasks) == ["own", "law"]
        retentions = []
        for name, found in result.tasks.items():
            base = tasks[name].mean(Net())
            own_expert = tasks[name].mean(loaded(states[name]))
            assert found.base == base
            assert found.expert == pytest.approx(own_expert, rel=1e-6)  # base + (peer - base), in fp32
            assert found.merged.n == 40
            assert found.normalised == pytest.approx(found.merged.value / own_expert)
            assert found.retention is not None
            assert found.retention.value == pytest.approx((found.merged.value - base) / (own_expert - base))
            retentions.append(found.retention.value)
        assert result.retention == pytest.approx(np.mean(retentions))


def test_the_best_scale_is_found_beyond_the_grid() -> None:
    """From 1 to 1.5 with a peer at 1.5: scale s gives 1 + s, so a target of 3.4 wants s = 2.4."""
    probe = Probe(evaluate=near(3.4))
    prober = make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], probe)
    result = prober.run(1, begin(probe)).merges["task_arithmetic"]
    assert result.inside
    assert result.scale == pytest.approx(0.8 * 1.6**2)  # 0.3, 0.5, 0.8 go on with the ratio of the last two
    assert [scale for scale, _ in result.tried][-1] > 2.4


def test_an_optimum_that_is_never_passed_is_marked() -> None:
    probe = Probe(evaluate=near(1000.0), max_evaluations=4)
    prober = make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], probe)
    result = prober.run(1, begin(probe)).merges["task_arithmetic"]
    assert not result.inside
    assert len([scale for scale, _ in result.tried if scale > 0]) == 4


def test_a_merge_that_never_helps_ends_at_the_base() -> None:
    probe = Probe(evaluate=near(0.5))
    prober = make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], probe)
    result = prober.run(1, begin(probe)).merges["task_arithmetic"]
    assert result.scale == 0.0
    assert result.merged == result.tasks["own"].merged.value == result.tasks["own"].base == -0.5
    assert result.retention is None  # the expert is worse than the base: there is nothing to keep


class TestLaterProbes:
    def search(self, probe: Probe, target: float, first_target: float) -> list[float]:
        """The positive scales that a second probe tries, after a first one whose best was elsewhere."""
        history = begin(probe)
        for step, wanted in enumerate((first_target, target), 1):
            there = dataclasses.replace(probe, evaluate=near(wanted))
            history.append(
                make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], there).run(step, history)
            )
        self.first, self.second = (record.merges["task_arithmetic"] for record in history.probes)
        return [scale for scale, _ in self.second.tried if scale > 0]

    def test_they_start_around_the_last_best_scale(self) -> None:
        tried = self.search(Probe(scales=(0.25, 0.5, 1.0)), target=3.0, first_target=3.0)
        assert self.first.scale == 2.0
        assert tried == pytest.approx([1.0, 2.0, 4.0])

    def test_the_ratio_is_that_of_the_whole_grid(self) -> None:
        tried = self.search(Probe(scales=(0.2, 0.3, 0.8)), target=1.3, first_target=1.3)
        assert self.first.scale == 0.3
        assert tried == pytest.approx([0.15, 0.3, 0.6])

    def test_they_widen_from_there(self) -> None:
        self.search(Probe(scales=(0.25, 0.5, 1.0)), target=9.0, first_target=3.0)
        assert self.second.inside
        assert self.second.scale == pytest.approx(8.0)

    def test_after_the_base_itself_was_best_the_grid_is_the_first_one_again(self) -> None:
        tried = self.search(Probe(scales=(0.25, 0.5, 1.0)), target=1.5, first_target=0.5)
        assert self.first.scale == 0.0
        assert {0.25, 0.5, 1.0} <= set(tried)

    def test_a_single_scale_stays_a_single_scale(self) -> None:
        assert self.search(Probe(scales=(0.4,), max_evaluations=1), target=3.0, first_target=3.0) == [0.4]

    def test_never_more_evaluations_than_allowed(self) -> None:
        tried = self.search(Probe(scales=(0.3, 0.5), max_evaluations=2), target=3.0, first_target=3.0)
        assert len(tried) <= 2

    def test_each_method_starts_from_its_own(self) -> None:
        """The average of two equal changes is half their sum, so it wants twice the scale."""
        probe = Probe(merge=["task_arithmetic", "average"], scales=(0.25, 0.5, 1.0, 2.0), evaluate=near(1.5))
        prober = make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], probe)
        history = begin(probe)
        history.append(prober.run(1, history))
        second = prober.run(2, history)
        for method, scale in (("task_arithmetic", 0.5), ("average", 1.0)):
            assert history.probes[0].merges[method].scale == scale
            tried = [s for s, _ in second.merges[method].tried if s > 0]
            assert tried == pytest.approx([scale / 2, scale, scale * 2])


class TestSurrogates:
    def test_against_merging_by_hand(self) -> None:
        own = Evaluation(0)
        model = expert(0)
        options = Surrogates(count=2, alone_scales=(0.3, 0.6), seed=5)
        probe = Probe(merge="ties", evaluate=own, surrogates=options)
        record = make_prober(model, Net(), [], probe).run(3, begin(probe))
        assert record.surrogate
        peers = synthetic_peers(LiveExpert(model, Net()).vector, options)
        for scale, mean in record.merges["ties"].tried:
            merged = merge(state_of(Net()), [state_of(model), *peers], "ties", scale=scale)
            assert mean == own.mean(loaded(merged))
        for scale in (0.3, 0.6):
            alone = merge(state_of(Net()), [state_of(model)], scale=scale)
            assert record.alone[f"{scale:g}"] == own.mean(loaded(alone))
        assert set(record.alone) == {"0.3", "0.6"}

    def test_with_peers_there_are_none(self) -> None:
        probe = Probe(evaluate=Evaluation(0))
        record = make_prober(expert(0), Net(), [expert(1)], probe).run(3, begin(probe))
        assert (record.surrogate, record.alone) == (False, {})

    def test_none_alone(self) -> None:
        probe = Probe(evaluate=near(2.0), surrogates=Surrogates(alone_scales=()))
        assert make_prober(OneNumber(1.5), OneNumber(), [], probe).run(1, begin(probe)).alone == {}


def test_a_known_score_of_the_expert_is_not_evaluated_again() -> None:
    own = Evaluation(0)
    probe = Probe(evaluate=own, scales=(0.5,), max_evaluations=1)
    prober = make_prober(expert(0), Net(), [expert(1)], probe)
    own.calls = 0
    record = prober.run(1, begin(probe), Score(0.75))
    assert own.calls == 1  # the merge
    assert (record.expert.value, record.expert.n) == (0.75, None)
    assert record.merges["task_arithmetic"].tasks["own"].expert == 0.75


@pytest.mark.parametrize("fails_at", range(1, 6))
@pytest.mark.parametrize("with_peers", [True, False])
def test_a_failing_evaluation_leaves_the_model_as_it_was(fails_at: int, with_peers: bool) -> None:
    calls = {"n": -1000}
    own = Evaluation(0)

    def sometimes(model: nn.Module) -> dict[str, Tensor]:
        calls["n"] += 1
        if calls["n"] == fails_at:
            raise RuntimeError("lost connection")
        return own(model)

    model = expert(0)
    model.dropout.eval()
    model.head.bias.requires_grad_(False)
    probe = Probe(merge=["ties", "average"], evaluate=sometimes)
    base = Net()
    with torch.no_grad():
        base.head.bias.copy_(model.head.bias)  # frozen parameters are the base's
    prober = make_prober(model, base, [expert(1)] if with_peers else [], probe)
    before, random = state_of(model), torch.get_rng_state()
    calls["n"] = 0
    with pytest.raises(EvaluationError, match="of own raised RuntimeError: lost connection"):
        prober.run(1, begin(probe))
    assert equal(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in (model, model.dropout, model.head)] == [True, False, True]
    assert [p.requires_grad for p in (model.head.bias, model.head.weight)] == [False, True]


def test_without_a_gain_retention_is_not_defined() -> None:
    probe = Probe(evaluate=lambda model: {"accuracy": [1.0, 0.0]})
    result = make_prober(expert(0), Net(), [expert(1)], probe).run(1, begin(probe)).merges["task_arithmetic"]
    assert (result.retention, result.tasks["own"].retention) == (None, None)
    assert result.tasks["own"].normalised == 1.0


def test_an_expert_at_zero_has_no_ratio_to_it() -> None:
    probe = Probe(evaluate=lambda model: {"accuracy": 0.0})
    result = make_prober(expert(0), Net(), [expert(1)], probe).run(1, begin(probe)).merges["task_arithmetic"]
    [only] = result.tasks.values()
    assert isinstance(only, TaskResult)
    assert only.normalised is None


class TestSettings:
    def test_one_method_or_several(self) -> None:
        assert list(Probe().methods) == ["task_arithmetic"]
        assert list(Probe(merge="ties").methods) == ["ties"]
        assert list(Probe(merge=["ties", "average"]).methods) == ["ties", "average"]
        ties = make_method("ties", density=0.5)
        assert Probe(merge=ties).methods == {"ties": ties}

    def test_the_same_method_twice_is_told_apart_by_its_parameters(self) -> None:
        probe = Probe(merge=["average", make_method("ties", density=0.5), "ties"])
        assert list(probe.methods) == ["average", "ties(density=0.5)", "ties(density=0.2)"]

    @pytest.mark.parametrize("merge", [[], ["ties", "ties"]])
    def test_methods_must_differ(self, merge: list[str]) -> None:
        with pytest.raises(OptionError, match="`merge` must name different merge methods"):
            Probe(merge=merge)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"merge": "tise"}, "there is no merge method 'tise'"),
            ({"scales": ()}, "`scales` must be positive numbers, at least one"),
            ({"scales": (0.5, -1.0)}, "`scales` must be positive numbers"),
            ({"max_evaluations": 2}, "`max_evaluations` is 2, below the 3 `scales`"),
        ],
    )
    def test_ranges(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            Probe(**options)

    @pytest.mark.parametrize(
        ("metric", "greater"),
        [
            ("accuracy", True),
            ("f1", True),
            ("eval_loss", False),
            ("Perplexity", False),
            ("word_error_rate", False),
        ],
    )
    def test_the_direction_goes_by_the_name(self, metric: str, greater: bool) -> None:
        assert Probe().is_greater_better(metric) is greater
        assert Probe(greater_is_better=not greater).is_greater_better(metric) is not greater

    def test_weights_of_the_wrong_number_are_an_error(self) -> None:
        probe = Probe(evaluate=near(2.0), weights=[1.0])
        prober = make_prober(OneNumber(1.5), OneNumber(), [OneNumber(1.5)], probe)
        with pytest.raises(OptionError, match="`weights` has 1 values for 2 experts"):
            prober.run(1, begin(probe))
