"""docs/study.md: does overtraining harm merging?"""

from __future__ import annotations

import json

import numpy as np

from benchmarks import experts_number_page, late_updates_page, vision_page
from benchmarks.overtraining_words import conclusions
from benchmarks.study_words import COUNTS, KEPT, MODELS, MORE, Study, cost, over, rate
from benchmarks.text_experts import ExpertSpec
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results, Sample
from mergeready.study.tables import curve_table, markdown, merge_labels, plain, shown, signed

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


def page(curve: Study, images: Study, number: Study, noise: Study) -> str:
    """The text, of the studies that were run."""
    parts = [
        "# Does overtraining harm merging?",
        _curve_text(curve),
        _ending(curve.results),
        _tasks_text(curve.results),
        late_updates_page.section(curve.results),
    ]
    further = ((images, vision_page.section), (number, experts_number_page.section), (noise, _noise_text))
    parts += [section(study) for study, section in further if study.results.contents]
    parts += [HOW.strip(), cost([curve, images, number, noise]) + _experts_cost(curve) + " " + MORE]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _curve_text(study: Study) -> str:
    results, suite, spec = study.results, study.suite, ExpertSpec(task="")
    arm, seeds = results.labels("arm")[0], results.labels("seed")
    return f"""
The question comes from Horoi et al. ([2506.14126](https://arxiv.org/abs/2506.14126)): experts that train long merge worse.
It is contested, and the answer depends on how one merges. So: {COUNTS[study.tasks]} text tasks, {MODELS[suite["backbone"]]} with frozen zero-shot
heads, all weights but the embeddings trained by AdamW at {rate(spec.learning_rate)} with batch {spec.batch_size} on
{spec.train_examples:,} examples a task, {len(seeds)} seeds
({", ".join(map(str, seeds))}). All {COUNTS[study.tasks]} experts are merged at each step; the scale is searched anew for every step, method
and seed on {suite["validation"]} validation examples a task, by a search that widens until the optimum is inside;
{suite["test"]} test examples a task are reported. Brackets are 95 % t intervals over seeds.

![Accuracy of experts and merges against the training step](study/overtraining-curves.png)

{curve_table(results, arm)}
"""


def _ending(results: Results) -> str:
    end = results.steps(results.labels("arm")[0])[-1]
    return f"## What training to step {end} does\n\n{conclusions(results)}"


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
{rate(trained.learning_rate)}, {trained.schedule.kind}; {over(results)}).

{markdown(["", "accuracy on", *(f"step {step}" for step in steps)], lines)}

{chr(10).join(sentences)}

![Curves under label noise](study/memorization-curves.png)
"""


def _kept_share(merged: Sample | None, experts: Sample | None) -> float:
    return merged.value / experts.value if merged and experts and experts.value else float("nan")


def _experts_cost(study: Study) -> str:
    spent = json.loads((KEPT / "text_experts.json").read_text())["cpu_seconds"]
    return (
        f" The experts of the first study were trained beforehand by `benchmarks.text_experts`; {len(spent)} of its "
        f"{study.tasks * len(study.settings.seeds)} runs were timed, {np.mean(spent):.0f} CPU seconds each on average."
    )
