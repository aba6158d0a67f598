"""A study's tables, as Markdown: the same results always give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergeready.study.cells import EXPERT
from mergeready.study.results import Results, Sample
from mergeready.training.records import Estimate


def tables(results: Results, name: str) -> str:
    """All tables of a study.

    Args:
        results: The cells.
        name: The study's name.
    """
    arms = results.labels("arm")
    if not arms:
        return f"# Study {name}\n\nNothing was computed yet.\n"
    parts = [f"# Study {name}", _about(results)]
    for arm in arms:
        parts += [f"## {arm}: expert and merged, by step", curve_table(results, arm)]
    parts += ["## Where it peaks, and what training to the end costs", peak_table(results)]
    if len(arms) > 1:
        parts += ["## Arms", arm_table(results)]
    if len(results.labels("count")) > 1:
        parts += ["## Number of experts", count_table(results)]
    return "\n\n".join(parts) + "\n"


def curve_table(results: Results, arm: str) -> str:
    """Base, experts and merges of one arm against the step."""
    moments: list[str] = [at for at in results.labels("at") if results.cells(arm, at, EXPERT)]
    head = [_at(at) for at in moments]
    lines = [["*base*", *(shown(results.base(arm, at)) for at in moments)]]
    lines.append(["*experts*", *(shown(results.sample(arm, at, EXPERT)) for at in moments)])
    for method in merge_labels(results):
        scales = [results.scales(arm, at, method) for at in moments]
        lines.append(
            [
                method,
                *(
                    shown(results.sample(arm, at, method)) + scale_note(s)
                    for at, s in zip(moments, scales, strict=True)
                ),
            ]
        )
    return markdown(["merged with", *head], lines)


def peak_table(results: Results) -> str:
    """For each arm and method: the step that validation data choose, and the last one."""
    lines = []
    for arm in results.labels("arm"):
        end = results.steps(arm)[-1]
        for method in [EXPERT, *merge_labels(results)]:
            best = results.best_step(arm, method)
            if best is None:
                continue
            difference = results.difference((arm, end, method), (arm, best, method))
            lines.append(
                [
                    arm,
                    "*experts*" if method == EXPERT else method,
                    str(best),
                    shown(results.sample(arm, best, method)),
                    shown(results.sample(arm, end, method)),
                    signed(difference),
                    signed(difference, examples=True),
                ]
            )
    head = [
        "arm",
        "merged with",
        "best step",
        "test there",
        "test at the end",
        "end − best",
        "… over examples",
    ]
    return markdown(head, lines)


def arm_table(results: Results) -> str:
    """Every arm at its end and at the step that validation data choose, against the first arm's end."""
    arms, lines = results.labels("arm"), []
    first, methods = arms[0], merge_labels(results)
    for arm in arms:
        end, seconds = results.steps(arm)[-1], results.training_seconds(arm)
        row = [arm, "" if seconds is None else f"{seconds:.0f}", shown(results.sample(arm, end, EXPERT))]
        for method in methods:
            against = results.difference((arm, end, method), (first, results.steps(first)[-1], method))
            best = results.best_step(arm, method)
            at_best = None if best is None else results.sample(arm, best, method)
            change = "" if arm == first else f" ({signed(against)})"
            at_end = results.sample(arm, end, method)
            row.append(f"{plain(at_end)}{change}; {plain(at_best)} at {best}" if at_end else "")
        lines.append(row)
    head = ["arm", "CPU-s a run", "experts at the end", *(f"{m}: end (− {first}); best" for m in methods)]
    return markdown(head, lines)


def count_table(results: Results) -> str:
    """The first arm's end by number of experts."""
    arm = results.labels("arm")[0]
    end, counts = results.steps(arm)[-1], sorted(results.labels("count"))
    lines = [
        [method, *(shown(results.sample(arm, end, method, count=count)) for count in counts)]
        for method in merge_labels(results)
    ]
    return markdown([f"merged with ({arm}, step {end})", *(f"{count} experts" for count in counts)], lines)


def merge_labels(results: Results) -> list[str]:
    """The study's merge methods."""
    return [method for method in results.labels("method") if method != EXPERT]


def shown(sample: Sample | None) -> str:
    """A mean with its interval."""
    return "" if sample is None else _interval(sample.estimate(), "")


def plain(sample: Sample | None) -> str:
    """A mean."""
    return "" if sample is None else f"{sample.value:.3f}"


def signed(sample: Sample | None, *, examples: bool = False) -> str:
    """A difference with its sign and interval."""
    if sample is None:
        return ""
    return _interval(sample.over_examples() if examples else sample.estimate(), "+")


def scale_note(scales: Sequence[tuple[float, bool]]) -> str:
    """Scales of all seeds; ``>`` where the optimum may lie beyond what was tried."""
    found = dict.fromkeys(f"{scale:.2g}{'' if inside else '>'}" for scale, inside in scales)
    return f" (×{', '.join(found)})" if found else ""


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    marks = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def _interval(estimate: Estimate, sign: str) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{sign}z.3f}"
    return f"{estimate.value:{sign}z.3f} [{estimate.low:{sign}z.3f}, {estimate.high:{sign}z.3f}]"


def _at(at: str) -> str:
    return f"step {at}" if at.isdigit() else at.replace("_", " ")


def _cpu_time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} CPU hours" if seconds >= 36 else f"{seconds:.1f} CPU seconds"


def _about(results: Results) -> str:
    seeds = sorted(results.labels("seed"))
    first = next(iter(results.contents.values()))
    sizes = [len(result["test"]) for result in first["tasks"].values()]
    examples = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    kind = "t intervals over seeds" if len(seeds) > 1 else "bootstrap intervals over examples"
    return (
        f"Means of {results.metric} over {len(sizes)} tasks with {examples} test examples each; seeds "
        f"{', '.join(map(str, seeds))}; brackets are 95 % {kind}. Scales (×, one a seed) and steps are chosen on "
        "validation examples; `>` marks a scale whose optimum may lie beyond what was tried. Merging, tuning and "
        f"testing took {_cpu_time(results.merging_seconds())}."
    )
