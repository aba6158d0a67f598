"""The part of docs/study.md on how many experts a merge bears."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study_words import COUNTS, MODELS, Study, excludes_zero, rate, share_kept
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results, Sample
from mergeready.study.tables import markdown, merge_labels, shown, signed


def section(study: Study) -> str:
    """The text."""
    results, suite, trained = study.results, study.suite, study.arm
    tasks, counts = list(study.settings.tasks or ()), sorted(study.settings.counts or ())
    first, end = results.steps(results.labels("arm")[0])[0], results.steps(results.labels("arm")[0])[-1]
    few = tasks[: counts[0]]
    return f"""
## How many experts a merge bears

{MODELS[suite["backbone"]]}, {suite["train"]} training examples a task, batch {trained.batch_size}, {trained.schedule.kind} from
{rate(trained.learning_rate)}, {end} steps, {len(study.settings.seeds)} seeds; the first {_listed(counts)} of {", ".join(tasks)} are merged, with the scale
tuned anew for each number. Brackets are 95 % t intervals over seeds.

Share of the experts' gain over the base that the merge keeps at step {end}, each over the tasks that are merged:

{_table(results, counts, lambda method, count: _kept(results, end, method, count, tasks[:count]))}

Accuracy on the first {COUNTS[len(few)]} tasks alone, which are in every merge:

{_table(results, counts, lambda method, count: shown(_of(results.sample(_arm(results), end, method, count=count), few)))}

{_sentences(results, counts, few, end)}

Accuracy at step {end} minus that at step {first}, over the tasks that are merged: does longer training harm more where more are merged?

{_table(results, counts, lambda method, count: signed(_change(results, first, end, method, count)))}

{_trend(results, counts, first, end)}
"""


def _table(results: Results, counts: Sequence[int], cell: object) -> str:
    assert callable(cell)
    lines = [[method, *(cell(method, count) for count in counts)] for method in merge_labels(results)]
    return markdown(["merged with", *(f"{count} experts" for count in counts)], lines)


def _arm(results: Results) -> str:
    return str(results.labels("arm")[0])


def _of(sample: Sample | None, tasks: Sequence[str]) -> Sample | None:
    return None if sample is None else Sample({task: sample.values[task] for task in tasks})


def _change(results: Results, first: int, end: int, method: str, count: int) -> Sample | None:
    arm = _arm(results)
    return results.difference((arm, end, method), (arm, first, method), count=count)


def _kept(results: Results, at: int, method: str, count: int, tasks: Sequence[str]) -> str:
    arm = _arm(results)
    merged = results.sample(arm, at, method, count=count)
    experts, base = _of(results.sample(arm, at, EXPERT), tasks), _of(results.base(arm, at), tasks)
    return "" if merged is None or experts is None or base is None else share_kept(merged, experts, base)


def _sentences(results: Results, counts: Sequence[int], few: Sequence[str], end: int) -> str:
    arm, lines = _arm(results), []
    for method in merge_labels(results):
        least, most = (
            _of(results.sample(arm, end, method, count=count), few) for count in (counts[0], counts[-1])
        )
        if least is None or most is None:
            continue
        change = most.minus(least)
        word = "changes" if excludes_zero(change) else "does not change measurably"
        lines.append(
            f"- With {method}, accuracy on these tasks {word} as {counts[-1]} experts are merged in place of {counts[0]}: "
            f"{signed(change)} over seeds, {signed(change, examples=True)} over examples."
        )
    return "\n".join(lines)


def _trend(results: Results, counts: Sequence[int], first: int, end: int) -> str:
    lines = []
    for method in merge_labels(results):
        changes = {count: _change(results, first, end, method, count) for count in counts}
        falls = [
            count
            for count, change in changes.items()
            if change and change.value < 0 and excludes_zero(change)
        ]
        rises = [
            count
            for count, change in changes.items()
            if change and change.value > 0 and excludes_zero(change)
        ]
        lines.append(
            f"- {method}: from step {first} to step {end}, accuracy rises with {_listed(rises) or 'no number of'} experts, falls with "
            f"{_listed(falls) or 'none'}; elsewhere intervals hold 0."
        )
    return "\n".join(lines)


def _listed(counts: Sequence[int]) -> str:
    words = [str(count) for count in counts]
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
