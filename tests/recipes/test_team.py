"""Teams: who is measured against whom, and what is refused before anybody trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from mergeready import read_history
from mergeready.errors import OptionError
from mergeready.recipes import parse_recipe, team, tiny
from mergeready.recipes.team import run_team
from tests.models import perturb


def content(folder: Path) -> dict[str, Any]:
    return {
        "model": "mergeready.recipes.tiny:text",
        "data": {"name": "mergeready.demo.samples:texts", "limit": {"train": 16, "validation": 8, "test": 8}},
        "task": {"kind": "text-classification", "max_tokens": 16},
        "optimisation": {
            "learning_rate": 1e-3,
            "steps": 2,
            "batch_size": 4,
            "save_every": 1,
            "device": "cpu",
        },
        "mergeready": {"probe": False, "picks": False, "measure": {"every": 1}},
        "team": {
            "members": {
                "a": {"data": {"with": {"task": "udhr"}}},
                "b": {"data": {"with": {"task": "emoji_name"}}},
            },
            "merge": ["average"],
        },
        "output": str(folder / "team"),
    }


@pytest.mark.slow
def test_members_are_measured_against_the_recipes_peers_too(tmp_path: Path) -> None:
    perturb(BertModel.from_pretrained(tiny.text()), 1).save_pretrained(tmp_path / "outsider")
    given = content(tmp_path)
    given["mergeready"]["peers"] = [str(tmp_path / "outsider")]
    run_team(parse_recipe(given))
    first, last = read_history(tmp_path / "team/a/mergeready/history.jsonl").metrics
    assert [label.rpartition("/")[2] for label in first.cosine] == ["outsider"]
    assert sorted(label.rpartition("/")[2] for label in last.cosine) == ["b", "outsider"]


def test_a_team_without_a_base_is_refused_before_anybody_trains(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["model"] = {"name": "tests.recipes.score:model", "processor": "mergeready.recipes.tiny:text"}
    with pytest.raises(OptionError, match=r"say with `mergeready.base` where it is"):
        run_team(parse_recipe(given))
    assert not list((tmp_path / "team").rglob("checkpoint-*"))


@pytest.mark.slow
def test_what_counts_and_in_which_direction_holds_to_the_end(tmp_path: Path) -> None:
    """Of the distance, one of the two numbers that are returned, less is better: the best merge changes little."""
    given = content(tmp_path)
    schedule = {"every": 2, "geometric": False}
    given["mergeready"]["probe"] = {
        "metric": "distance",
        "greater_is_better": False,
        "max_evaluations": 3,
        "schedule": schedule,
    }
    given["evaluation"] = "tests.recipes.score:distance"
    result = run_team(parse_recipe(given))
    assert result.metric == "distance"
    assert result.merged["average"]["mean"] < result.scores["mean"]
    assert result.scales["average"] < 1


def test_a_merge_that_overflows_at_some_scale_ends_no_team(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is trained by then."""
    real, calls = team.run_evaluation, []

    def overflows(evaluate: Any, model: Any, metric: str, name: str, **options: Any) -> Any:
        calls.append(name)
        broken = 8 < len(calls) <= 10  # after two members at the base and three scales
        return real(lambda m: {metric: math.nan} if broken else evaluate(m), model, metric, name, **options)

    monkeypatch.setattr(team, "run_evaluation", overflows)
    result = team.run_team(parse_recipe(content(tmp_path)))
    assert len(calls) > 10
    assert all(math.isfinite(value) for value in result.merged["average"].values())
