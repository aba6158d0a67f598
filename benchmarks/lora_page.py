"""The part of docs/results.md on adapters: rank, a common start, a frozen A."""

from __future__ import annotations

from benchmarks.study_words import COUNTS, MODELS, Study, excludes_zero, rate
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.tables import arm_table, markdown, merge_labels, shown, signed

PAIRS = (
    ("rank 16 in place of 4", "rank_16", "rank_4"),
    ("a start of one's own in place of a common one", "rank_16_own_start", "rank_16"),
    ("one frozen A in place of a trained one", "rank_16_frozen_a", "rank_16"),
)
"""What is asked: which arm against which."""
SUM, SPECTRAL = "task_arithmetic", "tsv_m"


def section(study: Study, whole: Study, whole_arm: str) -> str:
    """The text.

    Args:
        study: The study of adapters.
        whole: A study with the same tasks, seeds and steps in which whole models are trained.
        whole_arm: Its plain arm.
    """
    results, suite, trained = study.results, study.suite, study.arm
    end = results.steps(results.labels("arm")[0])[-1]
    return f"""
## Adapters

LoRA on all linear layers, alpha twice the rank, {rate(trained.learning_rate)}; the {COUNTS[study.tasks]} tasks, {suite["train"]} examples, {len(study.settings.seeds)} seeds
and {end} steps of `{whole_arm}` above ({MODELS[suite["backbone"]]}), which trains whole models. Adapters are merged as the changes of weights that they
make, never factor by factor; "common start" means that all experts of a seed begin with the same factors. Brackets are 95 % t intervals over seeds.

![Adapters side by side](study/{study.settings.name}-arms.png)

{arm_table(results)}

{chr(10).join(_sentences(results, end))}
{_leader(results, end)}

Against whole models, at the end of both:

{_against(results, whole.results, whole_arm, end)}
"""


def _sentences(results: Results, end: int) -> list[str]:
    lines = []
    for what, one, two in PAIRS:
        parts, told = [], []
        for method in (EXPERT, *merge_labels(results)):
            difference = results.difference((one, end, method), (two, end, method))
            if difference is None:
                continue
            name = "experts" if method == EXPERT else method
            parts.append(f"{name} {signed(difference)}")
            if excludes_zero(difference):
                told.append(name)
        lines.append(f"- **{what[0].upper()}{what[1:]}**: {'; '.join(parts)}. {_told(told)}")
    return lines


def _leader(results: Results, end: int) -> str:
    """Whether what is best for whole models is best here."""
    parts, better = [], []
    for arm in results.labels("arm"):
        difference = results.difference((arm, end, SPECTRAL), (arm, end, SUM))
        if difference is None:
            continue
        parts.append(f"`{arm}` {signed(difference)}")
        if difference.value > 0 and excludes_zero(difference):
            better.append(f"`{arm}`")
    found = f"better for {' and '.join(better)}" if better else "not measurably better for any"
    return f"- **{SPECTRAL} in place of {SUM}**: {'; '.join(parts)}: {found}."


def _told(names: list[str]) -> str:
    return f"Told from 0 for {' and '.join(names)}." if names else "None is told from 0."


def _against(results: Results, whole: Results, whole_arm: str, end: int) -> str:
    lines = [
        ["whole models", *(shown(whole.sample(whole_arm, end, m)) for m in (EXPERT, *merge_labels(results)))]
    ]
    for arm in results.labels("arm"):
        row = [f"`{arm}`"]
        for method in (EXPERT, *merge_labels(results)):
            ours, theirs = results.sample(arm, end, method), whole.sample(whole_arm, end, method)
            row.append("" if ours is None or theirs is None else signed(ours.minus(theirs)))
        lines.append(row)
    return markdown(["", "experts", *merge_labels(results)], lines)
