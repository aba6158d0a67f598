"""Writes docs/study.md, docs/results.md and their figures from the kept cells of the studies.

    mergeready study benchmarks/studies/overtraining.yaml -o benchmarks/results/study/overtraining   # computes cells
    python -m benchmarks.study_report                                                                # writes the pages

Every number on the pages, and every "rises", "falls" or "does not change measurably", is taken from the cells, and
every setting from the studies' files.
"""

from __future__ import annotations

import re
import shutil

from benchmarks import late_updates_page, results_page, study_page
from benchmarks.study_words import KEPT, ROOT, Study, load
from mergeready.study.report import write_report
from mergeready.study.run import Runner

DOCS = ROOT / "docs"
STUDY = ("overtraining", "vision", "experts_number", "memorization")
RESULTS = ("schedules", "techniques", "techniques_seeds", "techniques_eight", "techniques_vision", "lora")
NAMES = (*STUDY, *RESULTS)


def main() -> None:
    studies = {name: load(name) for name in NAMES}
    texts = pages(studies)
    for name, study in studies.items():
        _draw(name, study, set(re.findall(r"study/([\w-]+\.png)", "".join(texts.values()))))
    late_updates_page.draw(studies["overtraining"].results, DOCS / "study")
    for name, text in texts.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


def pages(studies: dict[str, Study]) -> dict[str, str]:
    """The pages' texts, by file name."""
    return {
        "study.md": study_page.page(*(studies[name] for name in STUDY)),
        "results.md": results_page.page(*(studies[name] for name in RESULTS)),
    }


def _draw(name: str, study: Study, shown: set[str]) -> None:
    """Write the tables, and copy the pictures that pages show."""
    for path in write_report(Runner(study.settings, KEPT / name)):
        picture = f"{name}-{path.name}"
        if picture in shown:
            shutil.copyfile(path, DOCS / "study" / picture)


if __name__ == "__main__":
    main()
