"""A study of your own datasets: which checkpoint, schedule and merge method fit, in a table with intervals.

The datasets here are folders that `datasets` wrote, with columns text and label; CSV, JSON and Parquet work too.
A study that is started again computes only what is missing.
"""

import argparse

from languages import RUNS, SENTENCES, make_base

from mergeready.study.report import write_report
from mergeready.study.run import Runner
from mergeready.study.settings import parse_study

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps and one seed")
quick = parser.parse_args().quick

folders = {}
for task, labels in {"a-f": range(17), "g-z": range(17, 38)}.items():  # languages by their first letter
    data = SENTENCES.filter(lambda row, labels=labels: row["label"] in labels)
    data.save_to_disk(RUNS / f"data-{task}")
    folders[task] = str(RUNS / f"data-{task}")

settings = parse_study(
    {
        "name": "languages",
        "suite": {
            "target": "mergeready.study.text_classification:suite",
            "arguments": {"model": str(make_base()), "datasets": folders, "max_tokens": 64},
        },
        "seeds": [0] if quick else [0, 1, 2],
        "steps": [10, 40] if quick else [10, 40, 160],
        "train": {"learning_rate": 1e-3, "batch_size": 16},
        "arms": {"constant": {}} if quick else {"constant": {}, "cosine": {"schedule": {"kind": "cosine"}}},
        "methods": ["task_arithmetic", "ties"],
    }
)
runner = Runner(settings, RUNS / ("study-quick" if quick else "study"))
print(f"{runner.run()} cells computed, {runner.trained} training runs\n")
write_report(runner)
print((runner.folder / "tables.md").read_text(encoding="utf-8"))
