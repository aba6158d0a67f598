"""Recommendations follow from cells that are kept, and the pages from the cells alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import study_report, study_words, techniques_page
from mergeready.merging import method_names
from mergeready.study.results import Results, Sample
from mergeready.study.settings import RateSettings
from mergeready.training.records import Estimate
from mergeready.training.settings import RunSettings
from mergeready.training.techniques.kronecker_filter import KroneckerFilter
from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty

ROOT = Path(study_report.__file__).parent.parent
SITUATIONS = yaml.safe_load((ROOT / "mergeready/recommendations.yaml").read_text())["situations"]


@cache
def study(name: str) -> study_words.Study:
    return study_words.load(name)


def kept(name: str) -> Results:
    return study(name).results


@pytest.mark.parametrize("entry", SITUATIONS, ids=lambda entry: str(entry["when"]))
def test_a_recommendation_names_cells_that_exist_or_says_not_measured(entry: dict[str, object]) -> None:
    if entry["recommend"] == "not measured":
        assert "settings" not in entry
        return
    known = {cell.key for cell in kept(str(entry["study"])).contents}
    given = dict(entry["settings"])  # type: ignore[call-overload]
    merge = given.pop("merge", None)
    schedule = given.pop("schedule", "constant")
    options = RunSettings.parse(given).options()
    assert options["stop"] is not None or merge or options["techniques"]
    assert RateSettings(kind=schedule)
    if merge:
        [choice] = (
            c for c in study(str(entry["study"])).settings.methods.values() if c.method == merge["method"]
        )
        assert (merge["scale"], merge["scales"]) == ("tune", choice.scales)
    for key in entry["cells"]:  # type: ignore[attr-defined]
        assert {key.replace("*", seed) for seed in "012"} <= known


def test_the_recommended_methods_differ_as_the_cells_say() -> None:
    results = kept("overtraining")
    end = ("constant", 256)
    for method in SITUATIONS[0]["when"]["merge"]:
        best = results.best_step("constant", method)
        change = results.difference((*end, method), ("constant", best, method))
        assert change is not None
        assert change.over_examples().high < 0  # type: ignore[operator]
        assert (change.over_seeds().high < 0) == (method == "dare_ties")  # type: ignore[operator]
    assert SITUATIONS[0]["note"].endswith("over seeds for dare_ties only")
    for method in SITUATIONS[1]["when"]["merge"]:
        best = results.best_step("constant", method)
        change = results.difference((*end, method), ("constant", best, method))
        assert change is not None
        assert change.over_examples().high > 0  # type: ignore[operator]
    over = results.difference((*end, "tsv_m"), ("constant", 64, "task_arithmetic"))
    assert over is not None
    assert over.over_seeds().low > 0  # type: ignore[operator]
    assert SITUATIONS[2]["settings"]["merge"]["method"] in method_names()


def test_what_is_said_of_adapters_is_what_the_cells_say() -> None:
    results = kept("lora")

    def change(one: tuple[str, str], two: tuple[str, str]) -> Estimate:
        found = results.difference((one[0], 160, one[1]), (two[0], 160, two[1]))
        assert found is not None
        return found.over_seeds()

    for arm in results.labels("arm"):
        assert change((arm, "tsv_m"), (arm, "task_arithmetic")).low < 0
    for arm in ("rank_4", "rank_16_own_start"):
        for method in results.labels("method"):
            found = change((arm, method), ("rank_16", method))
            assert found.low < 0 < found.high
    assert change(("rank_16_frozen_a", "task_arithmetic"), ("rank_16", "task_arithmetic")).high < 0


def test_the_recommended_technique_differs_as_the_cells_say() -> None:
    results, plain = kept("techniques_seeds"), ("cosine", 160)
    gain, lost, spectral = (
        results.difference(("attention", 160, method), (*plain, method))
        for method in ("task_arithmetic", "expert", "tsv_m")
    )
    assert gain is not None
    assert gain.over_seeds().low > 0  # type: ignore[operator]
    assert lost is not None
    assert -0.02 < lost.value < 0
    for arm in ("attention", "kronecker", "sam"):
        change = results.difference((arm, 160, "tsv_m"), (*plain, "tsv_m"))
        assert change is not None
        assert change.over_seeds().low < 0  # type: ignore[operator]
    assert spectral is not None
    assert spectral.value < 0


def change_of(arm: str, method: str, plain: str = "cosine") -> Sample:
    """Among eight experts."""
    found = kept("techniques_eight").difference((arm, 160, method), (plain, 160, method))
    assert found is not None
    return found


def options_of(arm: str) -> dict[str, Any]:
    [given] = study("techniques_eight").settings.arms[arm].techniques
    assert isinstance(given, dict)
    [options] = given.values()
    assert options is not None
    return options


def test_the_kronecker_filter_is_by_default_what_was_measured() -> None:
    chosen = techniques_page.RECOMMENDED
    default, options = KroneckerFilter(factors=["peer"]), options_of(chosen)
    assert (default.strength, default.every, default.rank) == tuple(
        options[key] for key in ("strength", "every", "rank")
    )
    for method in ("task_arithmetic", "ties"):
        assert change_of(chosen, method).over_seeds().low > 0  # type: ignore[operator]
    gain, over = (change_of(chosen, "task_arithmetic", plain) for plain in ("cosine", "plateau"))
    assert gain.value >= 0.05
    assert over.value >= 0.02
    assert over.over_seeds().low > 0  # type: ignore[operator]
    assert round(gain.value, 2) == 0.05
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "of eight experts by task arithmetic by about five points" in readme
    fewer = kept("techniques_seeds").difference(
        (chosen, 160, "task_arithmetic"), ("cosine", 160, "task_arithmetic")
    )
    assert fewer is not None
    assert round(fewer.value, 2) == 0.02
    assert fewer.over_seeds().low < 0  # type: ignore[operator]
    assert "of six by about two, which three seeds do not tell from none" in readme
    spectral = change_of(chosen, "tsv_m").over_seeds()
    assert spectral.low < 0 < spectral.high  # type: ignore[operator]


def test_the_filter_costs_experts_less_than_penalties_that_gain_as_much_or_less() -> None:
    arms = study("techniques_eight").settings.arms
    loss = change_of(techniques_page.RECOMMENDED, "expert").value
    assert -0.01 <= loss < 0
    others = [arm for arm in arms if arm not in ("cosine", "plateau", techniques_page.RECOMMENDED)]
    assert others
    assert all(change_of(arm, "expert").value < loss for arm in others)
    most = max(others, key=lambda arm: change_of(arm, "task_arithmetic").value)
    assert (
        change_of(most, "task_arithmetic").value
        < 0.01 + change_of("kronecker_filter", "task_arithmetic").value
    )
    ties = {arm: change_of(arm, "ties").value for arm in arms if arm != "cosine"}
    assert max(ties, key=lambda arm: ties[arm]) == techniques_page.RECOMMENDED


def test_the_kronecker_penalty_is_by_default_what_helped_most_of_penalties() -> None:
    default, options = KroneckerPenalty(factors=["peer"]), options_of("kronecker_weakly")
    assert (default.strength, default.every) == (options["strength"], options["every"])
    penalties = [arm for arm in study("techniques_eight").settings.arms if arm.startswith("kronecker_")]
    penalties.remove(techniques_page.RECOMMENDED)
    gains = {arm: change_of(arm, "task_arithmetic").value for arm in penalties}
    assert max(gains, key=lambda arm: gains[arm]) == "kronecker_weakly"


def test_pages_are_what_the_cells_give() -> None:
    """``python -m benchmarks.study_report`` writes them."""
    found = study_report.pages({name: study(name) for name in study_report.NAMES})
    for name, text in found.items():
        assert (ROOT / "docs" / name).read_text() == text
