"""Recommendations follow from cells that are kept, and the pages from the cells alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks import study_report, study_words
from mergeready.merging import method_names
from mergeready.study.results import Results, Sample
from mergeready.study.settings import RateSettings
from mergeready.training.records import Estimate
from mergeready.training.settings import RunSettings
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


def test_the_kronecker_penalty_is_by_default_what_helped_most() -> None:
    arms = study("techniques_eight").settings.arms
    results, plain, chosen = kept("techniques_eight"), ("cosine", 160), "kronecker_weakly"
    [given] = arms[chosen].techniques
    assert isinstance(given, dict)
    options = given["kronecker_penalty"]
    default = KroneckerPenalty(factors=["peer"])
    assert (default.strength, default.every) == (options["strength"], options["every"])

    def change(arm: str, method: str) -> Sample:
        found = results.difference((arm, 160, method), (*plain, method))
        assert found is not None
        return found

    gains = {arm: change(arm, "task_arithmetic").value for arm in arms if arm != "cosine"}
    assert max(gains, key=lambda arm: gains[arm]) == chosen
    for method in ("task_arithmetic", "ties"):
        assert change(chosen, method).over_seeds().low > 0  # type: ignore[operator]
    assert round(gains[chosen], 2) == 0.05
    assert "about five points" in " ".join((ROOT / "README.md").read_text().split())
    assert -0.02 < change(chosen, "expert").value < change("kronecker_faintly", "expert").value < 0
    spectral = change(chosen, "tsv_m").over_seeds()
    assert spectral.low < 0 < spectral.high  # type: ignore[operator]


def test_pages_are_what_the_cells_give() -> None:
    """``python -m benchmarks.study_report`` writes them."""
    found = study_report.pages({name: study(name) for name in study_report.NAMES})
    for name, text in found.items():
        assert (ROOT / "docs" / name).read_text() == text
