"""The part of docs/study.md on images: the curve of the text study again, with another kind of model and task."""

from __future__ import annotations

from benchmarks.overtraining_words import conclusions
from benchmarks.study_words import COUNTS, MODELS, Study, rate, share_kept
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.tables import curve_table, merge_labels, signed


def section(study: Study) -> str:
    """The text; its picture is the study's curves."""
    results, suite, trained = study.results, study.suite, study.arm
    arm, end = results.labels("arm")[0], results.steps(results.labels("arm")[0])[-1]
    return f"""
## On images

The same question of a convolutional network: {COUNTS[study.tasks]} image tasks ({", ".join(study.settings.tasks or ())}),
{MODELS[suite["backbone"]]} with linear heads fitted on the base's features and then frozen,
all other weights trained by AdamW at {rate(trained.learning_rate)} with batch {trained.batch_size} on at most {suite["train"]:,} examples a
task; {len(study.settings.seeds)} seeds, {suite["validation"]} validation and {suite["test"]} test examples a task. "best validation" merges each
expert's own best checkpoint.

![Accuracy on images against the training step](study/{study.settings.name}-curves.png)

{curve_table(results, arm)}

### What training to step {end} does to images

{conclusions(results)}

{_kept(results, arm, end)}
"""


def _kept(results: Results, arm: str, end: int) -> str:
    """How much there is to lose."""
    experts, base = results.sample(arm, end, EXPERT), results.base(arm, end)
    samples = {method: results.sample(arm, end, method) for method in merge_labels(results)}
    if experts is None or base is None:
        return ""
    shares = [
        f"{m} {share_kept(sample, experts, base)}" for m, sample in samples.items() if sample is not None
    ]
    return (
        f"Heads that were fitted to the base leave experts {signed(experts.minus(base))} to gain over it. Of that, merges at step {end} keep: "
        f"{'; '.join(shares)}. Where little is kept, there is little that longer training could cost."
    )
