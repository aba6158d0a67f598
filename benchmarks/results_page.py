"""docs/results.md: what training choices do to a merge."""

from __future__ import annotations

import numpy as np

from benchmarks import lora_page, techniques_page
from benchmarks.study_words import COUNTS, MODELS, MORE, Study, cost, excludes_zero, over, rate
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.tables import arm_table, merge_labels, signed

PAIRS = (
    ("reducing the rate on plateau in place of cosine, both to the end,", "plateau+end", "cosine+end"),
    ("stopping early under cosine", "cosine+early", "cosine+end"),
    ("stopping early under plateau", "plateau+early", "plateau+end"),
)
"""What is asked of the schedules: which arm against which."""
RECOMMENDED = """
## The settings behind this page

```python
from pathlib import Path

import mergeready
import yaml

path = Path(mergeready.__file__).parent / "recommendations.yaml"
print(yaml.safe_load(path.read_text())["situations"][0]["recommend"])
```
"""


def page(study: Study, screening: Study, seeds: Study, eight: Study, images: Study, adapters: Study) -> str:
    """The text, of the studies that were run."""
    results, suite, trained = study.results, study.suite, study.arm
    if not results.contents:
        return f"# What training choices do to a merge\n\nNot measured yet.\n\n{RECOMMENDED.strip()}\n"
    end = results.steps(results.labels("arm")[0])[-1]
    changes = [
        (method, what, difference)
        for method in merge_labels(results)
        for what, one, two in PAIRS
        if (difference := results.difference((one, end, method), (two, end, method))) is not None
    ]
    sentences = [
        f"- **{method}**: {what} changes merged accuracy by {signed(difference)}."
        for method, what, difference in changes
    ]
    told = sum(excludes_zero(difference) for _, _, difference in changes)
    patience = next(arm.stop.patience for arm in study.settings.arms.values() if arm.stop)
    return f"""# What training choices do to a merge

The starting paper changed two things at once: the schedule (reduced on plateau in place of cosine) and the moment to stop.
Here they are apart. {MODELS[suite["backbone"]]}, {COUNTS[study.tasks]} text tasks, {suite["train"]} training examples a task,
AdamW {rate(trained.learning_rate)}, batch {trained.batch_size}, {end} steps at most; "early" stops
when validation accuracy has not improved for {COUNTS[patience]} evaluations of {trained.evaluate_every} steps; {suite["test"]} test examples a task, {over(results)}.

![Arms side by side](study/schedules-arms.png)

{arm_table(results)}

Runs ended at these steps, on average over tasks: {_ended(results)}.

{chr(10).join(sentences)}

Of these {len(changes)} differences, {told} have an interval that excludes 0.

{techniques_page.section(screening, seeds, eight, images)}

{lora_page.section(adapters, seeds, techniques_page.PLAIN) if adapters.results.contents else ""}

{RECOMMENDED.strip()}

{cost([study, screening, seeds, eight, images, adapters])} {MORE}
"""


def _ended(results: Results) -> str:
    steps: dict[str, list[int]] = {}
    for cell, content in results.contents.items():
        if cell.method == EXPERT:
            steps.setdefault(cell.arm, []).extend(run["ended"] for run in content["runs"].values())
    return ", ".join(f"{arm} {np.mean(values):.0f}" for arm, values in steps.items())
