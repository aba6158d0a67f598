"""What a study with one arm says of training to the end: sentences made from the cells by rule."""

from __future__ import annotations

from benchmarks.study_words import excludes_zero, nothing, verdict
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.tables import merge_labels, peak_table, plain, signed


def conclusions(results: Results) -> str:
    """What training to the end does to experts and to each merge, of a study with one arm."""
    arm, end = results.labels("arm")[0], results.steps(results.labels("arm")[0])[-1]
    lines = [peak_table(results), ""]
    falls = []
    for method in merge_labels(results):
        best = results.best_step(arm, method)
        difference = None if best is None else results.difference((arm, end, method), (arm, best, method))
        if difference is None:
            continue
        if verdict(difference).startswith("falls"):
            falls.append(method)
        lines.append(
            f"- Merged with **{method}**, accuracy {verdict(difference)} from step {best}, which validation chose, to step {end}: "
            f"{plain(results.sample(arm, best, method))} to {plain(results.sample(arm, end, method))}, "
            f"{signed(difference)} over seeds, {signed(difference, examples=True)} over examples."
            if best != end
            else f"- Merged with **{method}**, accuracy is best at the last step, {plain(results.sample(arm, end, method))}."
        )
    early = min((results.best_step(arm, m) or end for m in falls), default=end)
    experts = results.difference((arm, end, EXPERT), (arm, early, EXPERT))
    if experts is not None and early != end:
        lines.append(
            f"- The experts themselves {verdict(experts, 'gain', 'lose')} meanwhile: {signed(experts)} over seeds from "
            f"step {early} to step {end}."
        )
    ranking = sorted(merge_labels(results), key=lambda m: -(results.sample(arm, end, m) or nothing()).value)
    if len(ranking) > 1:
        lines.append(_method_matters(results, arm, end, ranking[0]))
    lines += [
        "",
        "A plain “falls” or “rises” is said where both intervals exclude 0, over seeds and over examples; “on these seeds” where only the one over examples does.",
    ]
    return "\n".join(lines)


def _method_matters(results: Results, arm: str, end: int, best_method: str) -> str:
    stopped = {m: results.best_step(arm, m) or end for m in merge_labels(results) if m != best_method}
    rival = max(stopped, key=lambda m: (results.sample(arm, stopped[m], m) or nothing()).value)
    difference = results.difference((arm, end, best_method), (arm, stopped[rival], rival))
    largest = max(
        abs(change.value)
        for m in merge_labels(results)
        if (change := results.difference((arm, end, m), (arm, results.best_step(arm, m) or end, m)))
    )
    matters = difference is not None and excludes_zero(difference) and difference.value > largest
    claim = (
        f"The merge method matters more than the moment (at most {largest:.3f} above)"
        if matters
        else "Across merge methods"
    )
    return (
        f"- {claim}: {best_method} at step {end} against {rival}, the next best, at its best "
        f"step {stopped[rival]} is {signed(difference)} over seeds, {signed(difference, examples=True)} over examples."
    )
