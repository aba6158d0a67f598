"""The study's section on whether a cheap metric of experts tells how well they will merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mergeready.merging.evaluation import Score
from mergeready.metrics.prediction import Prediction, how_well_predicts
from mergeready.study.cells import EXPERT, Cell
from mergeready.study.results import Results
from mergeready.study.tables import markdown, merge_labels
from mergeready.training.bootstrap import retention

METRICS = {
    "norm": "‖τ‖",
    "growth": "growth of ‖τ‖ a step",
    "cosine": "cosine with peers",
    "sign_conflict": "sign conflict with peers",
    "overlap": "right-subspace overlap with peers",
    "alignment": "subspace alignment with the sum",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
}
"""What is measured of each expert."""
TOGETHER = {
    "norm_ratio": "largest over smallest ‖τ‖",
    "conflict_normalised": "sign conflict of all, over chance",
    "interference": "singular task interference",
    "times_over": "over-accumulation in the sum",
}
"""What is measured of all experts together."""
FEW = 8
"""Fewer groups than these are too few for an interval that means anything."""

Measured = Mapping[int, Mapping[str, Any]]
"""What ``benchmarks.late_updates`` keeps of each seed."""
Row = dict[str, Any]


def section(results: Results, measured: Measured) -> str:
    """The section, as Markdown."""
    arm, methods = results.labels("arm")[0], merge_labels(results)
    steps = results.steps(arm)
    cells = {method: cell_rows(results, measured, method) for method in methods}
    experts = {method: expert_rows(results, measured, method) for method in methods}
    within = {method: _predictions(experts[method], METRICS, "task") for method in methods}
    across = {method: _predictions(cells[method], METRICS | TOGETHER, "seed") for method in methods}
    peaks = {method: peak_steps(results, method) for method in methods}
    return f"""
## Does a cheap metric predict it?

Each metric needs the experts' weights alone: no merge, no data. Norms, cosines and signs are of all trained parameters,
the others of one matrix of each kind in six layers. What they have to tell is retention, (merged − base) / (expert − base).

{_turns_table(measured, steps)}

Means over experts and seeds. A metric turns where it has its highest or lowest value at a step between the first and the last.

{_peaks(measured, steps, peaks)}

### Across steps

Spearman's ρ of each metric's mean over experts with the retention of all tasks together, over {len(cells[methods[0]])} cells,
{len(steps)} steps of {len(measured)} seeds:

{markdown(["metric", *methods], [[name, *(f"{across[m][key].correlation:+.2f}" for m in methods)] for key, name in (METRICS | TOGETHER).items()])}

{_confounded(measured, steps, cells, methods)}

### Among experts of one step

The steps' means are taken out: at each step experts are ranked by a metric and by their own task's retention, and ρ is that
of the ranks over all steps. Brackets are 95 % bootstrap intervals over the tasks, since the same task comes again at each step and seed;
of so few tasks they are rather too narrow.

{markdown(["metric", *methods], [[name, *(shown(within[m][key]) for m in methods)] for key, name in METRICS.items()])}

{_verdict(within, methods)}
"""


def cell_rows(results: Results, measured: Measured, method: str) -> list[Row]:
    """One row a step and seed: metrics as means over experts, retention of the tasks' mean accuracies."""
    rows = []
    for seed, step, found in _moments(measured):
        tasks = _tasks(results, seed, step, method)
        means = {part: float(np.mean([values[part].value for values in tasks.values()])) for part in PARTS}
        kept = retention(*(Score(means[part]) for part in PARTS))
        row = {name: float(np.mean(found[name])) for name in (*METRICS, *TOGETHER)}
        rows.append(
            row
            | {
                "seed": seed,
                "step": step,
                "merged": means["merged"],
                "retention": kept.value if kept else None,
            }
        )
    return rows


def expert_rows(results: Results, measured: Measured, method: str) -> list[Row]:
    """One row an expert; every number is its rank among the experts of its step whose retention is defined."""
    rows = []
    for seed, step, found in _moments(measured):
        for index, (task, scores) in enumerate(_tasks(results, seed, step, method).items()):
            kept = retention(*(scores[part] for part in PARTS))
            if kept is not None:
                row = {name: found[name][index] for name in METRICS}
                rows.append(row | {"task": task, "seed": seed, "step": step, "retention": kept.value})
    return ranked_within(rows, "step", [*METRICS, "retention"])


def ranked_within(rows: Sequence[Row], key: str, columns: Iterable[str]) -> list[Row]:
    """Rows with numbers replaced by their ranks among the rows that share a key, as shares of how many these are.

    >>> ranked_within([{"at": 1, "x": 5.0}, {"at": 1, "x": 7.0}, {"at": 2, "x": 9.0}], "at", ["x"])
    [{'at': 1, 'x': 0.25}, {'at': 1, 'x': 0.75}, {'at': 2, 'x': 0.5}]
    """
    columns, ranked = list(columns), [dict(row) for row in rows]
    for value in dict.fromkeys(row[key] for row in rows):
        members = [row for row in ranked if row[key] == value]
        for column in columns:
            ranks = rankdata([row[column] for row in members])
            for row, rank in zip(members, ranks, strict=True):
                row[column] = (float(rank) - 0.5) / len(members)
    return ranked


def peak_steps(results: Results, method: str) -> dict[int, int]:
    """The step that validation data choose, by seed; the earliest of equals."""
    arm = results.labels("arm")[0]
    best: dict[int, tuple[float, int]] = {}
    for step in results.steps(arm):
        for cell in results.cells(arm, step, method):
            tasks = results.contents[cell]["tasks"].values()
            value = results.sign * float(np.mean([task["validation"] for task in tasks]))
            if cell.seed not in best or value > best[cell.seed][0]:
                best[cell.seed] = value, step
    return {seed: step for seed, (_, step) in sorted(best.items())}


def turns(values: Sequence[float], steps: Sequence[int]) -> list[int]:
    """The steps between the first and the last where a curve is highest or lowest.

    >>> turns([1.0, 3.0, 2.0, 0.5], [8, 16, 32, 64]), turns([1.0, 2.0, 3.0], [8, 16, 32])
    ([16], [])
    """
    places = (int(np.argmax(values)), int(np.argmin(values)))
    return sorted(steps[place] for place in places if 0 < place < len(values) - 1)


PARTS = ("merged", "base", "expert")


def _tasks(results: Results, seed: int, step: int, method: str) -> dict[str, dict[str, Score]]:
    """Each task's scores in the order of the study's tasks."""
    arm = results.labels("arm")[0]
    (merge,) = [cell for cell in results.cells(arm, step, method) if cell.seed == seed]
    own = Cell(arm, seed, str(step), EXPERT, merge.count)

    def score(result: Mapping[str, Any]) -> Score:
        examples = np.array(result["test"], dtype=np.float64)
        return Score(float(examples.mean()), examples)

    given = (
        results.contents[merge]["tasks"],
        results.contents[own]["base"],
        results.contents[own]["tasks"],
    )
    return {
        task: {part: score(tasks[task]) for part, tasks in zip(PARTS, given, strict=True)}
        for task in given[0]
    }


def _moments(measured: Measured) -> Iterable[tuple[int, int, Mapping[str, Any]]]:
    for seed, kept in measured.items():
        for step in sorted(map(int, kept["steps"])):
            yield seed, step, kept["steps"][str(step)]


def _curve(measured: Measured, steps: Sequence[int], name: str, seed: int) -> list[float]:
    return [float(np.mean(measured[seed]["steps"][str(step)][name])) for step in steps]


def _turns_table(measured: Measured, steps: Sequence[int]) -> str:
    lines = []
    for key, name in (METRICS | TOGETHER).items():
        curves = [_curve(measured, steps, key, seed) for seed in measured]
        found = [turns(curve, steps) for curve in curves]
        told = "; ".join(" and ".join(map(str, each)) or "no turn" for each in found)
        lines.append(
            [name, *(f"{value:.3g}" for value in np.mean(curves, axis=0)), told if any(found) else "never"]
        )
    seeds = ", ".join(map(str, measured))
    return markdown(
        ["metric", *(f"step {step}" for step in steps), f"turns at (seeds {seeds}; steps)"], lines
    )


def _peaks(measured: Measured, steps: Sequence[int], peaks: Mapping[str, Mapping[int, int]]) -> str:
    chosen = "; ".join(f"{method} {', '.join(map(str, found.values()))}" for method, found in peaks.items())
    where = {
        key: {seed: turns(_curve(measured, steps, key, seed), steps) for seed in measured}
        for key in METRICS | TOGETHER
    }
    never = [name for key, name in (METRICS | TOGETHER).items() if not any(where[key].values())]
    right = [
        f"{name} for {method}"
        for key, name in (METRICS | TOGETHER).items()
        for method, found in peaks.items()
        if all(step in where[key][seed] for seed, step in found.items())
    ]
    return (
        f"Validation data chose these steps, seed by seed: {chosen}. {len(never)} of the {len(where)} metrics never turn, so they "
        f"cannot mark a peak. {_agreement(right, len(measured), len(steps))}"
    )


def _agreement(right: Sequence[str], seeds: int, steps: int) -> str:
    if not right:
        return "No metric turns at the step which validation chose in every seed, for any merge method: none marks the peak."
    return (
        f"At the step which validation chose in every seed turns: {'; '.join(right)}. With {seeds} seeds and {steps} steps to choose "
        "from, agreement could be chance: no rule for stopping can be taken from it."
    )


def _confounded(
    measured: Measured, steps: Sequence[int], cells: Mapping[str, list[Row]], methods: Sequence[str]
) -> str:
    falls = {m: _predictions(cells[m], ["step"], "seed")["step"].correlation for m in methods}
    told = ", ".join(f"{falls[m]:+.2f} with {m}" for m in methods)
    return (
        f"These say little: the number of the step itself, which measures nothing, has {told}, and whatever grows or shrinks "
        f"during training about as much. {len(measured)} seeds are too few for an interval, "
        "and at one step too few to rank what is measured of all experts together."
    )


def _predictions(rows: Sequence[Row], metrics: Iterable[str], group: str) -> dict[str, Prediction]:
    return how_well_predicts(rows, list(metrics), group=group)


def shown(found: Prediction) -> str:
    """ρ, with its interval where there are groups enough."""
    if found.groups < FEW:
        return f"{found.correlation:+.2f}"
    return f"{found.correlation:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _verdict(within: Mapping[str, Mapping[str, Prediction]], methods: Sequence[str]) -> str:
    clear = {
        (method, key): found
        for method in methods
        for key, found in within[method].items()
        if excludes_zero(found)
    }
    count = len(methods) * len(METRICS)
    sizes = sorted({found.n for own in within.values() for found in own.values()})
    groups = max(found.groups for own in within.values() for found in own.values())
    text = (
        f"{len(clear)} of these {count} intervals exclude 0, where about {count * 0.05:.0f} would by chance"
        f" ({'–'.join(map(str, sizes[:: max(len(sizes) - 1, 1)]))} rows of {groups} tasks; retention is undefined where an expert is no better than its base)."
    )
    if not clear:
        return f"{text} No metric predicts which expert of a step will keep more."
    everywhere = [name for key, name in METRICS.items() if _same_sign(within, methods, key, clear)]
    text += (
        f" Excluding 0 with one sign for every merge method: {', '.join(everywhere)}."
        if everywhere
        else " No metric's interval excludes 0 for every merge method."
    )
    text += none_for(methods, within)
    lines = []
    for key, name in METRICS.items():
        found = [f"{m} ({within[m][key].correlation:+.2f})" for m in methods if (m, key) in clear]
        if found:
            lines.append(f"- **{name}**: {', '.join(found)}.")
    largest = max(clear.values(), key=lambda found: abs(found.correlation))
    return (
        text
        + f" The strongest, {largest.correlation:+.2f}, explains {largest.correlation**2:.0%} of the variance of ranks.\n\n"
        + "\n".join(lines)
    )


def none_for(methods: Sequence[str], found: Mapping[str, Mapping[str, Prediction]]) -> str:
    """A sentence that names the methods without an interval that excludes 0, where there are any."""
    none = [method for method in methods if not any(excludes_zero(each) for each in found[method].values())]
    return f" None does for {', '.join(none)}." if none else ""


def _same_sign(
    within: Mapping[str, Mapping[str, Prediction]],
    methods: Sequence[str],
    key: str,
    clear: Mapping[tuple[str, str], Prediction],
) -> bool:
    signs = {math.copysign(1, within[m][key].correlation) for m in methods}
    return all((m, key) in clear for m in methods) and len(signs) == 1


def excludes_zero(found: Prediction) -> bool:
    """Whether there are groups enough, and 0 is outside of the interval."""
    return found.groups >= FEW and (found.low > 0 or found.high < 0)
