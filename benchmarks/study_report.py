"""Writes docs/study.md, docs/results.md and their figures from the kept cells of the studies.

    mergeready study benchmarks/studies/overtraining.yaml -o benchmarks/results/study/overtraining   # computes cells
    python -m benchmarks.study_report                                                                # writes the pages

Every number on the pages, and every "rises", "falls" or "does not change measurably", is taken from the cells, and
every setting from the studies' files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import late_updates_page, lora_results, technique_results
from benchmarks.text_experts import ExpertSpec
from mergeready.study.cells import EXPERT
from mergeready.study.report import write_report
from mergeready.study.results import Results, Sample
from mergeready.study.run import Runner
from mergeready.study.settings import Arm, StudySettings, load_study
from mergeready.study.tables import (
    arm_table,
    curve_table,
    markdown,
    merge_labels,
    peak_table,
    plain,
    shown,
    signed,
)

ROOT = Path(__file__).parent.parent
STUDIES, KEPT, DOCS = ROOT / "benchmarks/studies", ROOT / "benchmarks/results/study", ROOT / "docs"
NAMES = ("overtraining", "vision", "schedules", "memorization", "techniques", "techniques_seeds", "lora")
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MODELS = {
    "minilm_l6": "MiniLM-L6",
    "minilm_l3": "MiniLM-L3",
    "squeezenet": "SqueezeNet",
    "efficientnet_lite0": "EfficientNet-Lite0",
}
PAIRS = (
    ("reducing the rate on plateau in place of cosine, both to the end,", "plateau+end", "cosine+end"),
    ("stopping early under cosine", "cosine+early", "cosine+end"),
    ("stopping early under plateau", "plateau+early", "plateau+end"),
)
"""What is asked of the schedules: which arm against which."""
WRONG, TRUE, RIGHT = "wrong labels", "their true labels", "right labels"

HOW = """
## Ask it of your own model

```python
from mergeready.study.settings import parse_study

study = parse_study({
    "name": "mine",
    "suite": {"target": "my_tasks:suite"},        # returns a mergeready.study.suite.StudySuite
    "seeds": [0, 1, 2],
    "steps": [8, 32, 128, 512],
    "axes": {
        "schedule": {"constant": {}, "cosine": {"schedule": {"kind": "cosine"}}},
        "stop": {"end": {}, "early": {"stop": {"patience": 3}}},
    },
    "methods": ["task_arithmetic", "ties", "tsv_m"],
})
print(list(study.arms))
```

Put the same into a file and run `mergeready study mine.yaml`. Each training run serves all checkpoints and merge
methods; a study that was killed goes on where it was; `--only constant+end/0/128/ties-8` computes one cell again from
scratch and compares; `--figures` draws everything again from what is kept.
"""


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


@dataclass(frozen=True)
class Study:
    """A study's settings, and what it found."""

    settings: StudySettings
    results: Results

    @property
    def arm(self) -> Arm:
        """What its arms share."""
        return next(iter(self.settings.arms.values()))

    @property
    def suite(self) -> dict[str, Any]:
        """Its suite's arguments."""
        return self.settings.suite.arguments

    @property
    def tasks(self) -> int:
        """Number of its tasks."""
        return len(self.settings.tasks or ())


def main() -> None:
    studies = {name: load(name) for name in NAMES}
    texts = pages(studies)
    for name, study in studies.items():
        _draw(name, study, set(re.findall(r"study/([\w-]+\.png)", "".join(texts.values()))))
    late_updates_page.draw(studies["overtraining"].results, DOCS / "study")
    for name, text in texts.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)


def load(name: str) -> Study:
    """A study and its kept cells."""
    settings = load_study(STUDIES / f"{name}.yaml")
    return Study(settings, Results(Runner(settings, KEPT / name).results()))


def pages(studies: dict[str, Study]) -> dict[str, str]:
    """The pages' texts, by file name."""
    return {
        "study.md": _study_page(studies["overtraining"], studies["vision"], studies["memorization"]),
        "results.md": _results_page(
            *(studies[name] for name in ("schedules", "techniques", "techniques_seeds", "lora"))
        ),
    }


def _draw(name: str, study: Study, shown: set[str]) -> None:
    """Write the tables, and copy the pictures that pages show."""
    for path in write_report(Runner(study.settings, KEPT / name)):
        picture = f"{name}-{path.name}"
        if picture in shown:
            shutil.copyfile(path, DOCS / "study" / picture)


def _study_page(curve: Study, vision: Study, noise: Study) -> str:
    parts = [
        "# Does overtraining harm merging?",
        _curve_text(curve),
        _conclusions(curve.results),
        _tasks_text(curve.results),
        late_updates_page.section(curve.results),
    ]
    if vision.results.contents:
        parts.append(_vision_text(vision))
    if noise.results.contents:
        parts.append(_noise_text(noise))
    parts += [HOW.strip(), _cost([curve, vision, noise]) + _experts_cost(curve) + " " + MORE]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _curve_text(study: Study) -> str:
    results, suite, spec = study.results, study.suite, ExpertSpec(task="")
    arm, seeds = results.labels("arm")[0], results.labels("seed")
    return f"""
The question comes from Horoi et al. ([2506.14126](https://arxiv.org/abs/2506.14126)): experts that train long merge worse.
It is contested, and the answer depends on how one merges. So: {COUNTS[study.tasks]} text tasks, {MODELS[suite["backbone"]]} with frozen zero-shot
heads, all weights but the embeddings trained by AdamW at {_rate(spec.learning_rate)} with batch {spec.batch_size} on
{spec.train_examples:,} examples a task, {len(seeds)} seeds
({", ".join(map(str, seeds))}). All {COUNTS[study.tasks]} experts are merged at each step; the scale is searched anew for every step, method
and seed on {suite["validation"]} validation examples a task, by a search that widens until the optimum is inside;
{suite["test"]} test examples a task are reported. Brackets are 95 % t intervals over seeds.

![Accuracy of experts and merges against the training step](study/overtraining-curves.png)

{curve_table(results, arm)}
"""


def _conclusions(results: Results, title: str = "##") -> str:
    arm, end = results.labels("arm")[0], results.steps(results.labels("arm")[0])[-1]
    lines = [f"{title} What training to step {end} does", "", peak_table(results), ""]
    falls = []
    for method in merge_labels(results):
        best = results.best_step(arm, method)
        difference = None if best is None else results.difference((arm, end, method), (arm, best, method))
        if difference is None:
            continue
        if _verdict(difference).startswith("falls"):
            falls.append(method)
        lines.append(
            f"- Merged with **{method}**, accuracy {_verdict(difference)} from step {best}, which validation chose, to step {end}: "
            f"{plain(results.sample(arm, best, method))} to {plain(results.sample(arm, end, method))}, "
            f"{signed(difference)} over seeds, {signed(difference, examples=True)} over examples."
            if best != end
            else f"- Merged with **{method}**, accuracy is best at the last step, {plain(results.sample(arm, end, method))}."
        )
    early = min((results.best_step(arm, m) or end for m in falls), default=end)
    experts = results.difference((arm, end, EXPERT), (arm, early, EXPERT))
    if experts is not None and early != end:
        lines.append(
            f"- The experts themselves {_verdict(experts, 'gain', 'lose')} meanwhile: {signed(experts)} over seeds from "
            f"step {early} to step {end}."
        )
    ranking = sorted(merge_labels(results), key=lambda m: -(results.sample(arm, end, m) or _nothing()).value)
    if len(ranking) > 1:
        lines.append(_method_matters(results, arm, end, ranking[0]))
    lines += [
        "",
        "A plain “falls” or “rises” is said where both intervals exclude 0, over seeds and over examples; “on these seeds” where only the one over examples does.",
    ]
    return "\n".join(lines)


def _method_matters(results: Results, arm: str, end: int, best_method: str) -> str:
    stopped = {m: results.best_step(arm, m) or end for m in merge_labels(results) if m != best_method}
    rival = max(stopped, key=lambda m: (results.sample(arm, stopped[m], m) or _nothing()).value)
    difference = results.difference((arm, end, best_method), (arm, stopped[rival], rival))
    largest = max(
        abs(change.value)
        for m in merge_labels(results)
        if (change := results.difference((arm, end, m), (arm, results.best_step(arm, m) or end, m)))
    )
    matters = difference is not None and _excludes_zero(difference) and difference.value > largest
    claim = (
        f"The merge method matters more than the moment (at most {largest:.3f} above)"
        if matters
        else "Across merge methods"
    )
    return (
        f"- {claim}: {best_method} at step {end} against {rival}, the next best, at its best "
        f"step {stopped[rival]} is {signed(difference)} over seeds, {signed(difference, examples=True)} over examples."
    )


def _tasks_text(results: Results) -> str:
    arm = results.labels("arm")[0]
    end, lines = results.steps(arm)[-1], []
    chosen = [m for m in merge_labels(results) if results.best_step(arm, m) != end]
    expert = results.sample(arm, end, EXPERT)
    for task in expert.values if expert else []:
        row = [task]
        for method in chosen:
            difference = results.difference(
                (arm, end, method), (arm, results.best_step(arm, method) or end, method)
            )
            row.append(signed(Sample({task: difference.values[task]}), examples=True) if difference else "")
        lines.append(row)
    return f"""
## Task by task

Test accuracy at step {end} minus that at the step which validation chose for all tasks together (in brackets: 95 % bootstrap
intervals over test examples).

{markdown(["task", *(f"{m}, from step {results.best_step(arm, m)}" for m in chosen)], lines)}

![Each task's curves](study/overtraining-tasks.png)
"""


def _vision_text(study: Study) -> str:
    results, suite, trained = study.results, study.suite, study.arm
    return f"""
## The same question on images

{COUNTS[study.tasks].capitalize()} image tasks ({", ".join(study.settings.tasks or ())}), {MODELS[suite["backbone"]]} at 64 pixels with frozen linear heads,
all other weights trained by AdamW at {_rate(trained.learning_rate)}, batch {trained.batch_size}, {trained.schedule.kind} rate, on up to {suite["train"]:,} examples a task;
{_seeds(results)}. Scales and steps are chosen on {suite["validation"]} validation examples a task.

![Accuracy of experts and merges of images](study/vision-curves.png)

{curve_table(results, results.labels("arm")[0])}

{_conclusions(results, "###")}
"""


def _noise_text(study: Study) -> str:
    results, arm = study.results, study.results.labels("arm")[0]
    steps, lines = results.steps(arm), []
    for method in [EXPERT, *merge_labels(results)]:
        for extra in (WRONG, TRUE, RIGHT, None):
            cells = [results.sample(arm, step, method, extra=extra) for step in steps]
            what = f"training examples, {extra}" if extra else "test"
            lines.append(
                ["*experts*" if method == EXPERT else method, what, *(shown(cell) for cell in cells)]
            )
    end = steps[-1]
    picks = {m: results.sample(arm, end, m, extra=WRONG) for m in [EXPERT, *merge_labels(results)]}
    right = {m: results.sample(arm, end, m, extra=RIGHT) for m in picks}
    sentences = [
        f"- At step {end}, {'the experts give' if m == EXPERT else f'the merge by {m} gives'} the *wrong* label of "
        f"{plain(picks[m])} of the examples that were trained with one, and the right label of {plain(right[m])} of as many "
        "others."
        for m in picks
    ]
    kept = {m: _kept_share(picks[m], picks[EXPERT]) for m in merge_labels(results)}
    sentences += [
        f"- Merging with {m} keeps {share:.0%} of what the experts memorised of wrong labels, and {_kept_share(right[m], right[EXPERT]):.0%} "
        "of right ones."
        for m, share in kept.items()
    ]
    suite, trained = study.suite, study.arm
    return f"""
## What is memorised, and what merging keeps of it

Of the training labels, {suite["label_noise"]:.0%} are replaced by wrong ones, and which is known ({MODELS[suite["backbone"]]},
{COUNTS[study.tasks]} tasks, {suite["train"]} examples, batch {trained.batch_size},
{_rate(trained.learning_rate)}, {trained.schedule.kind}; {_seeds(results)}: a lead, not a result).

{markdown(["", "accuracy on", *(f"step {step}" for step in steps)], lines)}

{chr(10).join(sentences)}

![Curves under label noise](study/memorization-curves.png)
"""


def _kept_share(merged: Sample | None, experts: Sample | None) -> float:
    return merged.value / experts.value if merged and experts and experts.value else float("nan")


def _results_page(study: Study, screening: Study, seeds: Study, lora: Study) -> str:
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
    told = sum(_excludes_zero(difference) for _, _, difference in changes)
    patience = next(arm.stop.patience for arm in study.settings.arms.values() if arm.stop)
    return f"""# What training choices do to a merge

The starting paper changed two things at once: the schedule (reduced on plateau in place of cosine) and the moment to stop.
Here they are apart. {MODELS[suite["backbone"]]}, {COUNTS[study.tasks]} text tasks, {suite["train"]} training examples a task,
AdamW {_rate(trained.learning_rate)}, batch {trained.batch_size}, {end} steps at most; "early" stops
when validation accuracy has not improved for {COUNTS[patience]} evaluations of {trained.evaluate_every} steps; {_seeds(results)},
{suite["test"]} a task, and say nothing of seeds: **a screening, not a result**.

![Arms side by side](study/schedules-arms.png)

{arm_table(results)}

Runs ended at these steps, on average over tasks: {_ended(results)}.

{chr(10).join(sentences)}

Of these {len(changes)} differences, {told} have an interval that excludes 0.

{technique_results.section((screening.settings, screening.results), (seeds.settings, seeds.results))}

{lora_results.section(lora.settings, lora.results)}

{RECOMMENDED.strip()}

{_cost([study, screening, seeds, lora])} {MORE}
"""


def _seeds(results: Results) -> str:
    count = len(results.labels("seed"))
    over = "seeds" if count > 1 else "test examples"
    return f"{count} seed{'s' if count > 1 else ''}, so the intervals are over {over}"


def _rate(value: float) -> str:
    """As one writes learning rates: 1e-4."""
    return f"{value:.0e}".replace("e-0", "e-")


def _ended(results: Results) -> str:
    steps: dict[str, list[int]] = {}
    for cell, content in results.contents.items():
        if cell.method == EXPERT:
            steps.setdefault(cell.arm, []).extend(run["ended"] for run in content["runs"].values())
    return ", ".join(f"{arm} {np.mean(values):.0f}" for arm, values in steps.items())


MORE = "More seeds, more test examples, longer runs and larger models are what a larger machine would add."


def _cost(studies: Iterable[Study]) -> str:
    parts = []
    for study in studies:
        name, results = study.settings.name, study.results
        if not results.contents:
            continue
        kept = [json.loads(path.read_text()) for path in sorted((KEPT / name / "runs").glob("*.json"))]
        training = sum(record["cpu_seconds"] for record in kept) / 3600
        merging = results.merging_seconds() / 3600
        trained = f"{training:.2f} CPU hours of training and " if kept else ""
        parts.append(f"{name}: {trained}{merging:.2f} CPU hours of merging, tuning and testing")
    return f"## Cost\n\n{'; '.join(parts)}."


def _experts_cost(study: Study) -> str:
    spent = json.loads((KEPT / "text_experts.json").read_text())["cpu_seconds"]
    return (
        f" The experts of the first study were trained beforehand by `benchmarks.text_experts`; {len(spent)} of its "
        f"{study.tasks * len(study.settings.seeds)} runs were timed, {np.mean(spent):.0f} CPU seconds each on average."
    )


def _verdict(sample: Sample, up: str = "rises", down: str = "falls") -> str:
    examples = sample.over_examples()
    if not _excludes_zero(sample):
        on_examples = (
            examples.low is not None and examples.high is not None and (examples.low > 0 or examples.high < 0)
        )
        word = up if sample.value > 0 else down
        return (
            f"{word} on these seeds, which are too few to say more,"
            if on_examples
            else "does not change measurably"
        )
    return up if sample.value > 0 else down


def _excludes_zero(sample: Sample) -> bool:
    """Both over seeds, where there are several, and over examples."""
    estimates: list[Any] = [sample.over_examples()]
    if sample.over_seeds().low is not None:
        estimates.append(sample.over_seeds())
    return all(e.low > 0 or e.high < 0 for e in estimates)


def _nothing() -> Sample:
    return Sample({"none": np.full((1, 1), -np.inf)})


if __name__ == "__main__":
    main()
