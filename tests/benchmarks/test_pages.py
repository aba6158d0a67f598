"""What is published of results is what the results give: tables are regenerated and compared byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import (
    fingerprints,
    in_place,
    late_updates_page,
    merge_engine,
    method_order,
    overhead,
    study_report,
    study_words,
)
from mergeready.study.table import rows
from mergeready.study.tables import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


PAGES = {
    "fingerprints": lambda: fingerprints.markdown(result("fingerprints")),
    "in_place": lambda: in_place.table(result("in_place")),
    "merge_engine": lambda: merge_engine.page(result("merge_engine")["machines"]),
    "method_order": lambda: method_order.table(result("method_order")),
    "overhead": lambda: overhead.table(result("overhead")["cells"], result("overhead")["notes"]),
}


def test_every_page_beside_results_is_compared_here() -> None:
    assert {path.stem for path in RESULTS.glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_tables_beside_results_are_what_the_results_give(name: str) -> None:
    assert (RESULTS / f"{name}.md").read_text("utf-8") == PAGES[name]()


@pytest.mark.parametrize("name", study_report.NAMES)
def test_tables_of_studies_are_what_their_cells_give(name: str) -> None:
    found, folder = study_words.load(name).results, RESULTS / "study" / name
    assert (folder / "tables.md").read_text("utf-8") == tables(found, name)
    assert pq.read_table(folder / "results.parquet").to_pylist() == list(rows(found.contents))


def test_what_the_study_says_of_late_updates_and_metrics_is_what_was_measured() -> None:
    section = late_updates_page.section(study_words.load("overtraining").results)
    assert section in (ROOT / "docs/study.md").read_text("utf-8")


def test_the_readme_says_what_the_study_found() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    study = study_words.load("overtraining")
    found, end = study.results, max(study.settings.steps)
    counts = study_words.COUNTS
    assert f"{counts[study.tasks]} text tasks, full fine-tuning of MiniLM-L6, {counts[3]} seeds" in text
    assert len(study.settings.seeds) == 3

    def change(method: str) -> Any:
        best = found.best_step("constant", method)
        return found.difference(("constant", end, method), ("constant", best, method))

    assert (
        "task arithmetic, TIES or DARE-TIES, accuracy is best at a quarter of the run and then falls" in text
    )
    for method in ("task_arithmetic", "ties", "dare_ties"):
        assert found.best_step("constant", method) == end / 4
        assert -0.05 < change(method).over_examples().high < 0
    assert "while the experts still gain" in text
    gain = found.difference(("constant", end, "expert"), ("constant", end // 4, "expert"))
    assert gain is not None
    assert min(gain.over_seeds().low or 0, gain.over_examples().low or 0) > 0
    assert (
        "merged with TSV-M it does not fall measurably, and with a plain average it is best at the end"
        in text
    )
    assert change("tsv_m").over_examples().high > 0
    assert found.best_step("constant", "average") == end
    assert "TSV-M at the end is ahead of task arithmetic at its best" in text
    ahead = found.difference(("constant", end, "tsv_m"), ("constant", end // 4, "task_arithmetic"))
    assert ahead is not None
    assert min(ahead.over_seeds().low or 0, ahead.over_examples().low or 0) > 0


def test_the_table_of_batchnorm_is_what_was_measured() -> None:
    content, text = result("batchnorm"), (ROOT / "benchmarks/README.md").read_text("utf-8")
    for kind in ("frozen", "live"):
        merges = content[kind]["merges"]
        names = ("base", "average", "recalibrated on the mixture", "recalibrated on each task")
        row = " | ".join(f"{merges[name]['mean']:.3f}" for name in names)
        assert f"| {kind} BatchNorm | {row} |" in text
    live = content["live"]["merges"].values()
    assert sum(not merge["inside"] for merge in live) == 3
    assert f"({content['test_images_a_task']} images a task" in text


def test_the_readme_says_what_was_found_of_images_techniques_and_adapters() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    images, found = study_words.load("vision"), study_words.load("vision").results
    counts, end = study_words.COUNTS, max(images.settings.steps)
    assert f"of {counts[images.tasks]} SqueezeNet experts" in text
    assert "no method's accuracy changes measurably after a quarter of the run" in text
    for method in images.settings.methods:
        change = found.difference(("constant", end, method), ("constant", end // 4, method))
        assert change is not None
        assert not study_words.excludes_zero(change)
    arms = {
        arm for name in ("techniques", "techniques_seeds") for arm in study_words.load(name).settings.arms
    }
    assert len(arms) == 17
    assert "holds seventeen ways to train against each other" in text
    assert "with LoRA, TSV-M is not measurably ahead of task arithmetic" in text
    adapters = study_words.load("lora").results
    for arm in adapters.labels("arm"):
        change = adapters.difference((arm, 160, "tsv_m"), (arm, 160, "task_arithmetic"))
        assert change is not None
        assert not (change.value > 0 and study_words.excludes_zero(change))
