from __future__ import annotations

from typing import Any

import pytest

from mergeready import MergedPlateau, NormBudget, Picks, Probe, Schedule
from mergeready.errors import OptionError
from mergeready.training.monitor import DEFAULT_MEASURE, Monitor
from mergeready.training.policies import AnyOf
from mergeready.training.settings import RunSettings


def options(content: dict[str, Any]) -> dict[str, Any]:
    return dict(RunSettings.parse(content).options())


def test_nothing_given_is_what_a_callback_does_by_default() -> None:
    found = options({})
    assert found["probe"] == Probe(merge=found["probe"].merge)
    assert found["probe"].methods == Probe().methods
    assert found == {
        "base": None,
        "peers": [],
        "probe": found["probe"],
        "stop": None,
        "on_stop": "stop",
        "measure": DEFAULT_MEASURE,
        "sampled_every": None,
        "picks": Picks(),
        "difficulty": None,
        "techniques": [],
    }
    Monitor(**found)


def test_everything_given() -> None:
    found = options(
        {
            "base": "org/base",
            "peers": ["a", "b"],
            "probe": {
                "merge": ["ties", {"dare_ties": {"density": 0.25}}],
                "scales": [0.5, 1],
                "evaluate": "tests.training.test_settings:evaluate",
                "metric": "accuracy",
                "greater_is_better": True,
                "schedule": {"every": 50, "geometric": False},
                "max_evaluations": 4,
            },
            "stop": {"merged_plateau": {"patience": 4}, "norm_budget": {"max_norm": 2.0}},
            "on_stop": "record",
            "measure": {"every": 10},
            "picks": {"pareto": 3},
        }
    )
    probe = found["probe"]
    assert list(probe.methods) == ["ties", "dare_ties"]
    assert probe.methods["dare_ties"].describe()["density"] == 0.25
    assert probe.schedule == Schedule(every=50, geometric=False)
    assert (probe.scales, probe.evaluate, probe.metric, probe.max_evaluations) == (
        (0.5, 1),
        evaluate,
        "accuracy",
        4,
    )
    assert isinstance(found["stop"], AnyOf)
    assert found["stop"].policies == (MergedPlateau(patience=4), NormBudget(max_norm=2.0))
    assert found["measure"] == Schedule(every=10)
    assert found["picks"] == Picks(pareto=3)
    assert (found["base"], found["peers"], found["on_stop"]) == ("org/base", ["a", "b"], "record")


def test_false_turns_probes_and_picks_off() -> None:
    found = options({"probe": False, "picks": False})
    assert found["probe"] is None
    assert found["picks"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peer": ["a"]}, "peer"),
        ({"peers": "a"}, "peers"),
        ({"probe": {"merge": ["tied"]}}, "no merge method 'tied'"),
        ({"probe": {"merge": [{"ties": {"dens": 0.2}}]}}, "ties has no parameter dens"),
        ({"probe": {"merge": [{"ties": {}, "average": {}}]}}, "one method an entry"),
        ({"probe": {"merge": []}}, "merge"),
        ({"stop": {"merged_plateau": {"patience": 0}}}, "patience"),
        ({"stop": {"plateau": {}}}, "plateau"),
        ({"measure": {"every": 0}}, "`every` must be at least 1"),
        ({"on_stop": "pause"}, "on_stop"),
    ],
)
def test_what_is_not_understood_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RunSettings.parse(content)


def test_all_offenders_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        RunSettings.parse({"peer": [], "on_stop": "pause", "measure": {"every": 0}})
    assert all(word in str(caught.value) for word in ("peer", "on_stop", "every"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("evaluate", "must be module:function"),
        ("no.such.module:f", "No module named"),
        ("tests.training.test_settings:nothing", "has no nothing"),
    ],
)
def test_an_evaluation_that_is_not_there(place: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options({"probe": {"evaluate": place}})


def test_survives_being_dumped_and_read_again() -> None:
    """Trainers keep their configuration as plain data, and drop what is None."""
    settings = RunSettings.parse({"peers": ["a"], "picks": False, "stop": {"norm_budget": {"max_norm": 1.0}}})
    assert RunSettings.parse(settings.model_dump(exclude_none=True)) == settings


def evaluate(model: Any) -> dict[str, float]:
    return {"accuracy": 0.5}


def test_techniques_by_name_and_with_settings() -> None:
    given = ["weight_average", {"simulated_merge": {"every": 2}}]
    made = RunSettings.parse({"techniques": given}).options()["techniques"]
    assert [technique.name for technique in made] == ["weight_average", "simulated_merge"]
    assert made[1].every == 2
    for wrong in (["sam"], [{"simulated_merge": {"p": 1}}], ["weight_average", "weight_average"]):
        with pytest.raises(OptionError, match=r"technique|simulated_merge|given twice"):
            RunSettings.parse({"techniques": wrong})
    stop = RunSettings.parse({"stop": {"plateau_schedule": {"patience": 3}}}).options()["stop"]
    assert stop is not None
