from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.training.history import History
from mergeready.training.policies import (
    AllOf,
    AnyOf,
    Decision,
    ExpertPlateau,
    MergedPlateau,
    NormBudget,
    Policy,
)
from mergeready.training.records import DecisionRecord
from tests.training.histories import curves, merged_curve, metrics, probe, resumed_with_peers, start


def stops_at(policy: Policy, history: History) -> int | None:
    """The step at which a policy first says stop, asked after each record as a run does."""
    for length in range(1, len(history) + 1):
        if policy(History(history[:length])).stop:
            return int(history[length - 1].step)
    return None


class TestMergedPlateau:
    @pytest.mark.parametrize(
        ("values", "patience", "step"),
        [
            ([0.5, 0.6, 0.6, 0.6], 1, 30),
            ([0.5, 0.6, 0.6, 0.6], 2, 40),
            ([0.5, 0.6, 0.6, 0.6], 3, None),
            ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 50),  # an improvement starts the count anew
            ([0.5, 0.6, 0.7, 0.8, 0.9], 1, None),
            ([0.9, 0.1, 0.2, 0.3], 3, 40),  # rising again is not yet better than the best
            ([0.5], 1, None),
        ],
    )
    def test_greater_is_better(self, values: list[float], patience: int, step: int | None) -> None:
        assert stops_at(MergedPlateau(patience=patience), merged_curve(values)) == step

    @pytest.mark.parametrize(
        ("values", "patience", "step"),
        [([2.0, 1.0, 1.0, 1.5], 2, 40), ([2.0, 1.5, 1.0, 0.5], 1, None), ([1.0, 2.0, 3.0], 2, 30)],
    )
    def test_smaller_is_better(self, values: list[float], patience: int, step: int | None) -> None:
        assert stops_at(MergedPlateau(patience=patience), merged_curve(values, greater=False)) == step

    def test_min_delta_ignores_small_steps_but_not_a_slow_climb(self) -> None:
        policy = MergedPlateau(patience=2, min_delta=0.05)
        assert stops_at(policy, merged_curve([0.5, 0.52, 0.54])) == 30
        assert stops_at(policy, merged_curve([0.5, 0.53, 0.56, 0.59, 0.62])) is None  # 0.56 and 0.62 count

    def test_exactly_min_delta_is_no_improvement(self) -> None:
        policy = MergedPlateau(patience=1, min_delta=0.25)
        assert stops_at(policy, merged_curve([0.5, 0.75])) == 20
        assert stops_at(policy, merged_curve([0.5, 0.75 + 1e-9])) is None

    def test_min_step_delays(self) -> None:
        policy = MergedPlateau(patience=1, min_step=45)
        assert stops_at(policy, merged_curve([0.5, 0.4, 0.4, 0.4, 0.4])) == 50

    def test_it_does_not_look_at_the_expert(self) -> None:
        history = curves(expert=[0.1, 0.2, 0.3, 0.4], ties=[0.5, 0.4, 0.3, 0.2])
        assert stops_at(MergedPlateau(patience=3), history) == 40
        history = curves(expert=[0.4, 0.3, 0.2, 0.1], ties=[0.1, 0.2, 0.3, 0.4])
        assert stops_at(MergedPlateau(patience=1), history) is None

    def test_every_method_must_have_stopped_improving(self) -> None:
        history = curves(ties=[0.5, 0.4, 0.4, 0.4, 0.4], average=[0.5, 0.6, 0.7, 0.6, 0.6])
        assert stops_at(MergedPlateau(patience=2), history) == 50
        assert stops_at(MergedPlateau(patience=2, methods=["ties"]), history) == 30
        assert stops_at(MergedPlateau(patience=2, methods=["average"]), history) == 50

    def test_the_reason_names_methods_values_and_steps(self) -> None:
        decision = MergedPlateau(patience=2)(curves(ties=[0.5, 0.4, 0.3], average=[0.25, 0.2, 0.1]))
        assert decision.reason == (
            "merged metric: ties has not improved on 0.5 (step 10) for 2 probes; "
            "average has not improved on 0.25 (step 10) for 2 probes"
        )
        waiting = MergedPlateau(patience=3)(curves(ties=[0.5, 0.4, 0.3]))
        assert waiting == Decision(False, "merged with ties was best at step 10, 2 probes ago")

    def test_a_method_that_nobody_probes_is_an_error(self) -> None:
        with pytest.raises(OptionError, match=r"names \['dare'\], but the probe runs \['ties'\]"):
            MergedPlateau(methods=["ties", "dare"])(merged_curve([0.5]))

    def test_before_the_first_probe_it_goes_on(self) -> None:
        for history in (History(), History([start("ties"), metrics(5, 1.0)])):
            assert MergedPlateau(methods=["dare"])(history) == Decision(False, "no probe yet")

    def test_merges_with_other_peers_are_no_measure(self) -> None:
        """As in a team's first round, whose merges are with surrogates."""
        history = resumed_with_peers([0.9, 0.9], [0.5, 0.6, 0.7, 0.7, 0.7])
        assert stops_at(MergedPlateau(patience=2), history) == 70

    def test_methods_of_an_earlier_run_do_not_keep_it_going(self) -> None:
        """Resumed with TIES alone: what averaging did before can never stop improving."""
        earlier = curves(ties=[0.5, 0.5], average=[0.5, 0.6])
        history = History([*earlier, start("ties", step=20), probe(30, 0.5, ties=0.4)])
        assert stops_at(MergedPlateau(patience=2), history) == 30
        with pytest.raises(OptionError, match=r"names \['average'\], but the probe runs \['ties'\]"):
            MergedPlateau(methods=["average"])(history)

    @pytest.mark.parametrize("methods", ["ties", [], ()])
    def test_methods_must_be_a_list_with_something_in_it(self, methods: object) -> None:
        with pytest.raises(OptionError, match="`methods` must be a list of labels"):
            MergedPlateau(methods=methods)


class TestExpertPlateau:
    def test_it_looks_at_the_expert_alone(self) -> None:
        history = curves(expert=[0.5, 0.6, 0.6, 0.5], ties=[0.1, 0.2, 0.3, 0.4])
        assert stops_at(ExpertPlateau(patience=2), history) == 40
        assert stops_at(ExpertPlateau(patience=3), history) is None

    def test_smaller_is_better(self) -> None:
        history = curves(greater=False, expert=[2.0, 1.0, 1.2, 1.1], ties=[0.0] * 4)
        assert stops_at(ExpertPlateau(patience=2), history) == 40

    def test_min_delta_and_min_step(self) -> None:
        history = curves(expert=[0.5, 0.51, 0.52, 0.53], ties=[0.0] * 4)
        assert stops_at(ExpertPlateau(patience=1, min_delta=0.1), history) == 20
        assert stops_at(ExpertPlateau(patience=1, min_delta=0.1, min_step=35), history) == 40

    def test_the_expert_is_what_it_is_whatever_the_peers(self) -> None:
        assert stops_at(ExpertPlateau(patience=3), resumed_with_peers([0.9, 0.9], [0.5, 0.6, 0.7])) == 40

    def test_another_metric_is_no_measure(self) -> None:
        """Resumed with a loss."""
        loss = replace(start("ties", greater=False, step=20), metric="loss")
        history = History(
            [*curves(ties=[0.5, 0.5]), loss, probe(30, 2.0, ties=2.0), probe(40, 1.9, ties=1.9)]
        )
        for policy in (ExpertPlateau(patience=2), MergedPlateau(patience=2)):
            assert stops_at(policy, history) is None

    def test_the_reason(self) -> None:
        history = curves(expert=[0.25, 0.75, 0.5], ties=[0.0] * 3)
        reason = "expert metric was best at step 20 (0.75), 1 probes ago"
        assert ExpertPlateau(patience=1)(history) == Decision(True, reason)
        assert ExpertPlateau()(History()) == Decision(False, "no probe yet")


@pytest.mark.parametrize("policy", [MergedPlateau, ExpertPlateau])
class TestRangesOfPlateaus:
    def test_patience(self, policy: type) -> None:
        with pytest.raises(OptionError, match="`patience` must be at least 1, not 0"):
            policy(patience=0)

    @pytest.mark.parametrize("value", [-0.1, float("nan")])
    def test_min_delta(self, policy: type, value: float) -> None:
        with pytest.raises(OptionError, match="`min_delta` must not be negative"):
            policy(min_delta=value)


class TestNormBudget:
    def test_it_stops_beyond_the_limit_not_at_it(self) -> None:
        history = History([metrics(1, 1.0), metrics(2, 2.0), metrics(3, 2.1)])
        assert stops_at(NormBudget(max_norm=2.0), history) == 3
        assert NormBudget(max_norm=2.0)(history).reason == "‖τ‖ = 2.1 is beyond 2"

    def test_the_relative_limit(self) -> None:
        history = History([metrics(1, 9.0, 0.01), metrics(2, 9.0, 0.03)])
        assert stops_at(NormBudget(max_relative_norm=0.02), history) == 2
        assert "‖τ‖/‖θ₀‖ = 0.03 is beyond 0.02" in NormBudget(max_relative_norm=0.02)(history).reason

    def test_either_limit_is_enough(self) -> None:
        policy = NormBudget(max_norm=5.0, max_relative_norm=0.5)
        assert stops_at(policy, History([metrics(1, 6.0, 0.1)])) == 1
        assert stops_at(policy, History([metrics(1, 1.0, 0.6)])) == 1
        assert stops_at(policy, History([metrics(1, 1.0, 0.1)])) is None

    def test_a_base_of_zeros_is_left_at_any_relative_limit(self) -> None:
        assert NormBudget(max_relative_norm=1e9)(History([metrics(1, 1.0, None)])).stop

    def test_only_the_newest_counts(self) -> None:
        assert not NormBudget(max_norm=2.0)(History([metrics(1, 3.0), metrics(2, 1.0)])).stop

    def test_before_the_first_measurement_it_goes_on(self) -> None:
        assert NormBudget(max_norm=1.0)(merged_curve([0.5])) == Decision(False, "no measurement yet")

    @pytest.mark.parametrize("limits", [{}, {"max_norm": 0.0}, {"max_norm": 1.0, "max_relative_norm": -1.0}])
    def test_limits_must_be_positive(self, limits: dict[str, float]) -> None:
        with pytest.raises(OptionError, match="needs a positive"):
            NormBudget(**limits)


def says(stop: bool, reason: str) -> Policy:
    return lambda history: Decision(stop, reason)


class TestCombinations:
    def test_any_of(self) -> None:
        policy = AnyOf(says(False, "a"), says(True, "b"), says(True, "c"))
        assert policy(History()) == Decision(True, "b; c")
        assert AnyOf(says(False, "a"), says(False, "b"))(History()) == Decision(False, "a; b")

    def test_all_of(self) -> None:
        policy = AllOf(says(True, "a"), says(False, "b"), says(False, "c"))
        assert policy(History()) == Decision(False, "b; c")
        assert AllOf(says(True, "a"), says(True, "b"))(History()) == Decision(True, "a; b")

    def test_they_nest(self) -> None:
        history = curves(expert=[0.5, 0.6, 0.5], ties=[0.5, 0.4, 0.4])
        both = AllOf(ExpertPlateau(patience=1), AnyOf(MergedPlateau(patience=2), NormBudget(max_norm=1.0)))
        assert stops_at(both, history) == 30

    @pytest.mark.parametrize("combination", [AnyOf, AllOf])
    def test_nothing_to_combine(self, combination: type) -> None:
        with pytest.raises(OptionError, match="name at least one policy"):
            combination()


POLICIES = [
    MergedPlateau(patience=2),
    MergedPlateau(patience=1, min_delta=0.2, min_step=30, methods=["ties"]),
    ExpertPlateau(patience=2),
    NormBudget(max_norm=0.8),
    AnyOf(MergedPlateau(patience=1), NormBudget(max_norm=0.9)),
    AllOf(MergedPlateau(patience=1), ExpertPlateau(patience=1)),
]
VALUES = st.lists(st.tuples(*[st.floats(0, 1).map(lambda v: round(v, 1))] * 3), min_size=1, max_size=8)


@given(values=VALUES, greater=st.booleans())
@pytest.mark.parametrize("policy", POLICIES)
def test_decisions_are_functions_of_the_history_alone(
    policy: Policy, values: list[tuple[float, float, float]], greater: bool
) -> None:
    """Asked again, asked of a history that went to JSON and back, or asked first with a longer one: all the same."""
    history = History([start("ties", greater=greater)])
    for index, (expert, merged, norm) in enumerate(values):
        history.append(metrics(10 * index + 10, norm))
        history.append(probe(10 * index + 10, expert, ties=merged))
    before = list(history)
    decisions = [policy(History(history[:length])) for length in range(1, len(history) + 1)]
    again = [policy(History(history[:length])) for length in reversed(range(1, len(history) + 1))]
    assert decisions == again[::-1]
    assert policy(History.from_json(copy.deepcopy(history.to_json()))) == decisions[-1]
    assert list(history) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_noted_decisions_change_nothing(policy: Policy) -> None:
    history = merged_curve([0.5, 0.4, 0.3])
    noted = History([*history, DecisionRecord(step=30, reason="enough", acted=False)])
    assert policy(history) == policy(noted)
