"""What rank and start of LoRA adapters do to a merge: the part of docs/results.md that comes from the study of LoRA."""

from __future__ import annotations

from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.settings import StudySettings
from mergeready.study.tables import merge_labels, peak_table, signed

PAIRS = (
    ("rank 4 in place of 16", "rank_4", "rank_16"),
    ("a start of one's own in place of a shared one", "rank_16_own_start", "rank_16"),
    ("a shared A that stays frozen, in place of one that trains,", "rank_16_frozen_a", "rank_16"),
)
"""What is asked: which arm against which."""


def section(settings: StudySettings, results: Results) -> str:
    """The text; empty before anything was computed."""
    if not results.contents:
        return ""
    trained, suite = next(iter(settings.arms.values())), settings.suite.arguments
    end, lines = max(settings.steps), []
    for what, one, two in PAIRS:
        for method in [EXPERT, *merge_labels(results)]:
            difference = results.difference((one, end, method), (two, end, method))
            if difference is not None:
                whose = "the experts'" if method == EXPERT else f"the {method} merge's"
                lines.append(
                    f"- {what[0].upper()}{what[1:]} changes {whose} accuracy by {signed(difference)}."
                )
    return f"""## LoRA: rank, and where adapters start

Adapters of all linear layers of {suite["backbone"]}, {len(settings.tasks or ())} text tasks, {suite["train"]} examples a task, AdamW {trained.learning_rate:g}, batch {trained.batch_size},
{trained.schedule.kind} rate, {len(results.labels("seed"))} seeds; brackets are 95 % t intervals over seeds. "Own start" draws A for every task, all others share the draw.

![Curves of the arms](study/lora-curves.png)

{peak_table(results)}

{chr(10).join(lines)}"""
