"""The study's section on what late updates are, and its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from benchmarks import late_updates, prediction_page, tsv_parts
from benchmarks.prediction_page import Measured
from mergeready.metrics.prediction import how_well_predicts
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results
from mergeready.study.tables import markdown, merge_labels
from mergeready.training.figures import EXPERT_COLOR, MARK_COLOR

FIGURE = "overtraining-late.png"
LATE_COLOR = "#d1495b"
SHARPENS = "tsv_m"
"""The method that is explained; the others are what it is compared with."""
KEPT = "energy in left directions that TSV-M takes of the end"


@dataclass(frozen=True)
class Figure:
    """A number an expert, and its mean with a 95 % t interval over tasks.

    Attributes:
        values: Seeds × tasks.
    """

    values: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Over seeds and tasks."""
        return float(self.values.mean())

    @property
    def half(self) -> float:
        """Half of the interval's width, from the tasks' means over seeds."""
        tasks = self.values.mean(axis=0)
        return float(stdtrit(len(tasks) - 1, 0.975) * tasks.std(ddof=1) / math.sqrt(len(tasks)))

    def minus(self, other: Figure) -> Figure:
        """The difference, expert by expert."""
        return Figure(self.values - other.values)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return abs(self.mean) > self.half

    def shown(self, sign: str = "") -> str:
        """Mean and interval."""
        low, high = self.mean - self.half, self.mean + self.half
        digits = 3 if max(abs(low), abs(high)) < 3 else 1
        return f"{self.mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def section(results: Results) -> str:
    """What late updates are, and what metrics predict: two sections, as Markdown."""
    measured = _measured(results)
    return f"{_late_text(results, measured).strip()}\n\n{prediction_page.section(results, measured).strip()}"


def _measured(results: Results) -> Measured:
    return {seed: late_updates.load(seed) for seed in sorted(results.labels("seed"))}


def _late_text(results: Results, measured: Measured) -> str:
    pick, end = next(iter(measured.values()))["pick"], results.steps(results.labels("arm")[0])[-1]
    return f"""
## What late updates are

The experts' task vectors at step {end}, minus those at step {pick}, beside those at step {pick}. Means over experts; brackets are
95 % t intervals over the {len(next(iter(measured.values()))["tasks"])} tasks, each a mean of {len(measured)} seeds. Ranks, energies and subspaces are of one
matrix of each kind in six layers, all else of all trained parameters.

![Ranks, energies and interference of early and late updates](study/{FIGURE})

Bars are the same intervals, bands the range of seeds.

{_parts_table(measured, pick, end)}

{_explanation(results, measured, pick, end)}

{_changes_text(results, measured, pick, end)}
"""


def _of(measured: Measured, *path: str) -> Figure:
    """A number of the late parts, by its place."""

    def at(kept: Mapping[str, Any]) -> Any:
        found = kept["late"]
        for key in path:
            found = found[key]
        return found

    return Figure(np.array([at(kept) for kept in measured.values()], dtype=np.float64))


def _spectrum(measured: Measured, key: str) -> Figure:
    rows = [[expert[key] for expert in kept["late"]["spectrum"]] for kept in measured.values()]
    return Figure(np.array(rows, dtype=np.float64))


def _at(measured: Measured, step: int, key: str) -> Figure:
    rows = [np.atleast_1d(kept["steps"][str(step)][key]) for kept in measured.values()]
    return Figure(np.array(rows, dtype=np.float64))


def _pairs(measured: Measured, pick: int) -> dict[str, tuple[Figure, Figure]]:
    """What both parts have: name to early and late."""
    found = {
        name: (_spectrum(measured, f"early_{key}"), _spectrum(measured, f"late_{key}"))
        for key, name in {
            "stable_rank": "stable rank",
            "effective_rank": "effective rank",
            "top_1": "energy in the leading direction",
            "top_4": "energy in 4 leading directions",
            "top_16": "energy in 16 leading directions",
            "kept": KEPT,
        }.items()
    }
    return found | {
        "cosine with the peers' part": (_of(measured, "cosine", "early"), _of(measured, "cosine", "late")),
        "sign conflict with the peers' part": (
            _of(measured, "sign_conflict", "early"),
            _of(measured, "sign_conflict", "late"),
        ),
        "right-subspace overlap with the peers' part": (
            _at(measured, pick, "overlap"),
            _of(measured, "overlap"),
        ),
        "subspace alignment with the sum of such parts": (
            _at(measured, pick, "alignment"),
            _of(measured, "alignment"),
        ),
    }


def _parts_table(measured: Measured, pick: int, end: int) -> str:
    lines = [
        [name, early.shown(), late.shown(), late.minus(early).shown("+")]
        for name, (early, late) in _pairs(measured, pick).items()
    ]
    return markdown(["", f"until step {pick}", f"from {pick} to {end}", "late − early"], lines)


def _explanation(results: Results, measured: Measured, pick: int, end: int) -> str:
    norm, cosine = _of(measured, "norm_to_early"), _of(measured, "cosine_with_early")
    stable = _pairs(measured, pick)["stable rank"]
    lines = [
        f"- **Size and direction.** The late part is {norm.shown()} times as long as the early one, and its cosine with it is "
        f"{cosine.shown()}: training {_goes_on(cosine)}.",
        f"- **Spectrum.** Its stable rank {_word(stable[1].minus(stable[0]), 'is higher than', 'is lower than', 'does not differ clearly from')} "
        f"that of the early part ({stable[0].mean:.1f} and {stable[1].mean:.1f}). The early part's {late_updates.RANK} leading directions hold "
        f"{_inside(measured, 'left')} on the side of outputs and {_inside(measured, 'right')} on the side of inputs.",
        f"- **Between experts.** {_between(measured, pick, end)}",
        f"- **Scale.** {_scales(results, measured, pick, end)}",
        f"- **Unequal growth.** {_lengths(measured, pick, end)}",
        f"- **What {SHARPENS} leaves out.** {_left_out(measured)}",
        f"- **What {SHARPENS} makes orthogonal.** {_orthogonal(measured, pick, end)}",
        "",
        _summary(measured, pick, end),
        "",
        "Nothing was taken out and merged again for these figures: they say what goes together, not what causes what.",
        "",
        "An experiment says more: " + tsv_parts.sentence(results, tsv_parts.results()),
    ]
    return "\n".join(lines)


def _goes_on(cosine: Figure) -> str:
    return _word(
        cosine, "goes on partly in the same direction", "partly turns back", "goes on at a right angle"
    )


def _word(figure: Figure, up: str, down: str, neither: str) -> str:
    return neither if not figure.excludes_zero else up if figure.mean > 0 else down


def _inside(measured: Measured, side: str) -> str:
    share, chance = (
        _spectrum(measured, f"late_inside_{side}"),
        _spectrum(measured, f"chance_{side}").mean,
    )
    low, high = share.mean - share.half, share.mean + share.half
    return f"{share.mean:.1%} [{low:.1%}, {high:.1%}] of the late energy (chance {chance:.1%})"


def _seeds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _between(measured: Measured, pick: int, end: int) -> str:
    parts = _pairs(measured, pick)
    told = []
    for name in ("cosine with the peers' part", "sign conflict with the peers' part"):
        early, late = parts[name]
        word = _word(late.minus(early), "higher", "lower", "not clearly different")
        told.append(f"{name.split(' with')[0]} is {word} ({early.mean:.3f} and {late.mean:.3f})")
    return f"Among late parts {' and '.join(told)} than among early ones." + " " + _crossing(measured)


def _crossing(measured: Measured) -> str:
    other, early = _of(measured, "cosine", "late_with_early_of_peers"), _of(measured, "cosine", "early")
    return f"The late part's cosine with the early parts of its peers is {other.shown()} (early with early {early.mean:.3f})."


def _scales(results: Results, measured: Measured, pick: int, end: int) -> str:
    arm, told = results.labels("arm")[0], []
    norms = {step: _at(measured, step, "norm").mean for step in (pick, end)}
    for method in merge_labels(results):
        scales = {step: [scale for scale, _ in results.scales(arm, step, method)] for step in (pick, end)}
        if set(scales[pick] + scales[end]) <= {1.0}:
            continue
        one, two = (float(np.mean(scales[step])) for step in (pick, end))
        told.append(
            f"{method} ×{one:.2f} to ×{two:.2f} (times ‖τ‖: {one * norms[pick]:.1f} to {two * norms[end]:.1f})"
        )
    return (
        f"‖τ‖ grows from {norms[pick]:.2f} to {norms[end]:.2f} between the two steps, and the best scales change as follows, means over "
        f"seeds: {', '.join(told)}."
    )


def _left_out(measured: Measured) -> str:
    early, late, whole = (_spectrum(measured, f"{part}_kept") for part in ("early", "late", "end"))
    difference = late.minus(early)
    claim = _word(
        difference,
        "It takes more of late updates than of early ones: leaving out weak directions does not single out what was learned late",
        "It takes less of late updates than of early ones, which fits that it does not fall",
        "It does not tell late updates from early ones",
    )
    return (
        f"Its directions of an expert hold {whole.mean:.1%} of the end's energy, {early.mean:.1%} of the early part's and "
        f"{late.mean:.1%} of the late part's. {claim} ({difference.shown('+')})."
    )


def _orthogonal(measured: Measured, pick: int, end: int) -> str:
    told, grows = [], []
    for key, name in (("interference", "singular task interference"), ("times_over", "over-accumulation")):
        one, two = (_at(measured, step, key).values[:, 0] for step in (pick, end))
        own = _of(measured, key).values
        told.append(
            f"{name} of the experts is {_seeds(one)} at step {pick} and {_seeds(two)} at step {end} (seed by seed), "
            f"{_seeds(own)} among late parts alone"
        )
        grows.append(_seeds_verdict(two - one))
    if "grows" not in grows:
        claim = "Neither grows measurably: there is no sign that leading directions collide more and more."
    elif set(grows) == {"grows"}:
        claim = "Both grow: what a plain sum does too often, and orthogonal directions do once, is more at the end, which fits."
    else:
        claim = f"The first {grows[0]}, the second {grows[1]}: no explanation of this kind is clear."
    return f"{told[0][0].upper() + told[0][1:]}; {told[1]}. {claim}"


def _lengths(measured: Measured, pick: int, end: int) -> str:
    one, two = (_at(measured, step, "norm_ratio").values[:, 0] for step in (pick, end))
    return (
        f"The longest τ is {_seeds(one)} times as long as the shortest at step {pick} and {_seeds(two)} times at step {end} (seed by "
        f"seed): the ratio {_seeds_verdict(two - one)}."
    )


def _summary(measured: Measured, pick: int, end: int) -> str:
    """Which of the things that one may suspect hold, each by its own interval."""
    pairs = _pairs(measured, pick)

    def late_minus_early(name: str) -> Figure:
        return pairs[name][1].minus(pairs[name][0])

    def grew(key: str) -> bool:
        one, two = (_at(measured, step, key).values[:, 0] for step in (pick, end))
        return _seeds_verdict(two - one) == "grows"

    cosine, kept = late_minus_early("cosine with the peers' part"), late_minus_early(KEPT)
    rank = late_minus_early("stable rank")
    suspects = {
        "late updates are less concentrated in leading directions": rank.excludes_zero and rank.mean > 0,
        f"{SHARPENS} leaves out more of late updates than of early ones": kept.excludes_zero
        and kept.mean < 0,
        "late updates of different tasks point against each other more": cosine.excludes_zero
        and cosine.mean < 0,
        "leading directions of different experts collide more": grew("interference"),
        "the sum does more things several times over": grew("times_over"),
        "experts' lengths drift apart": grew("norm_ratio"),
    }
    holds = [what for what, found in suspects.items() if found]
    verdict = f"by its interval this holds: {'; '.join(holds)}" if holds else "none holds by its interval"
    return (
        f"Of {len(suspects)} things that one may suspect where a plain sum falls and {SHARPENS} does not "
        f"({'; '.join(suspects)}), {verdict}."
    )


def _seeds_verdict(differences: NDArray[np.float64]) -> str:
    """Grows or falls where the 95 % t interval over seeds excludes 0."""
    count = len(differences)
    half = (
        float(stdtrit(count - 1, 0.975) * differences.std(ddof=1) / math.sqrt(count))
        if count > 1
        else math.inf
    )
    mean = float(differences.mean())
    return "does not change clearly" if abs(mean) <= half else "grows" if mean > 0 else "falls"


CHANGES: dict[str, tuple[str, ...]] = {
    "late over early norm": ("norm_to_early",),
    "cosine of late with early": ("cosine_with_early",),
    "late cosine with peers": ("cosine", "late"),
    "late sign conflict with peers": ("sign_conflict", "late"),
    "late right-subspace overlap with peers": ("overlap",),
    "late subspace alignment with the sum": ("alignment",),
    "late stable rank": ("spectrum", "late_stable_rank"),
    "late effective rank": ("spectrum", "late_effective_rank"),
    "late energy inside early left directions": ("spectrum", "late_inside_left"),
    "late energy inside early right directions": ("spectrum", "late_inside_right"),
    "late energy in what TSV-M takes": ("spectrum", "late_kept"),
}
"""What of an expert's late part may tell how its task changes, and where it is kept."""


def change_rows(results: Results, measured: Measured, method: str) -> list[dict[str, Any]]:
    """One row an expert: figures of its late part, and how the merge's accuracy on its task changed with it."""
    arm, rows = results.labels("arm")[0], []
    end = results.steps(arm)[-1]
    for number, (seed, kept) in enumerate(measured.items()):
        change = results.difference((arm, end, method), (arm, kept["pick"], method))
        if change is None:
            continue
        for index, task in enumerate(kept["tasks"]):
            row: dict[str, Any] = {
                name: float(
                    (_spectrum(measured, path[1]) if path[0] == "spectrum" else _of(measured, *path)).values[
                        number, index
                    ]
                )
                for name, path in CHANGES.items()
            }
            rows.append(
                row | {"task": task, "seed": seed, "change": float(change.values[task][number].mean())}
            )
    return rows


def _changes_text(results: Results, measured: Measured, pick: int, end: int) -> str:
    methods = [EXPERT, *merge_labels(results)]
    found = {
        m: how_well_predicts(change_rows(results, measured, m), list(CHANGES), outcome="change", group="task")
        for m in methods
    }
    clear = [
        f"{name} for {'the experts' if m == EXPERT else m} ({found[m][name].correlation:+.2f})"
        for name in CHANGES
        for m in methods
        if prediction_page.excludes_zero(found[m][name])
    ]
    count = len(CHANGES) * len(methods)
    lines = [[name, *(prediction_page.shown(found[m][name]) for m in methods)] for name in CHANGES]
    rows = found[EXPERT][next(iter(CHANGES))]
    return f"""
Does an expert's late part tell how accuracy on its task changes from step {pick} to step {end}? Spearman's ρ over {rows.n} experts, with
95 % bootstrap intervals over the {rows.groups} tasks:

{markdown(["of the late part", *("*experts*" if m == EXPERT else m for m in methods)], lines)}

{len(clear)} of these {count} intervals exclude 0, where about {count * 0.05:.0f} would by chance{f": {'; '.join(clear)}" if clear else ""}.{prediction_page.none_for(methods, found)}"""


def draw(results: Results, folder: Path) -> None:
    """Draw the section's figure as PNG."""
    from matplotlib.figure import Figure as Canvas

    arm, measured = results.labels("arm")[0], _measured(results)
    steps, kept = results.steps(arm), next(iter(measured.values()))
    pick, end = kept["pick"], steps[-1]
    canvas = Canvas(figsize=(12, 3.9), layout="constrained")
    rank, energy, together = canvas.subplots(1, 3)
    for key, color, name in (("stable_rank", EXPERT_COLOR, "stable rank of τ"),):
        curves = [_at(measured, step, key) for step in steps]
        rank.errorbar(
            steps, [c.mean for c in curves], [c.half for c in curves],
            fmt="-o", color=color, markersize=4, capsize=2, label=name,
        )  # fmt: skip
    late = _spectrum(measured, "late_stable_rank")
    rank.errorbar(
        [end * 1.15], [late.mean], [late.half], fmt="D", color=LATE_COLOR, markersize=7, markerfacecolor="white", capsize=2,
        label=f"of τ at {end} − τ at {pick}",
    )  # fmt: skip
    _steps_axis(rank, steps)
    rank.set_title("directions that updates use", fontsize=11)
    tops = [1, 4, 16]
    for part, color, name, beside in (
        ("early", EXPERT_COLOR, f"τ at step {pick}", -0.04),
        ("late", LATE_COLOR, f"added until step {end}", 0.04),
    ):
        shares = [_spectrum(measured, f"{part}_top_{top}") for top in tops]
        energy.errorbar(
            np.arange(len(tops)) + beside, [s.mean for s in shares], [s.half for s in shares],
            fmt="-o", color=color, markersize=4, capsize=2, label=name,
        )  # fmt: skip
    energy.set_xticks(range(len(tops)), [str(top) for top in tops])
    energy.set_xlabel("leading directions")
    energy.set_title("share of energy in them", fontsize=11)
    for key, color, name in (
        ("interference", "#7b4fa3", "singular task interference"),
        ("times_over", "#e59500", "over-accumulation"),
    ):
        values = np.array([_at(measured, step, key).values[:, 0] for step in steps])
        relative = values / values[0]
        together.plot(steps, relative.mean(axis=1), "-o", color=color, markersize=4, label=name)
        together.fill_between(
            steps, relative.min(axis=1), relative.max(axis=1), color=color, alpha=0.15, linewidth=0
        )
    together.axhline(1, color=MARK_COLOR, linestyle=":", linewidth=1)
    _steps_axis(together, steps)
    together.set_title(f"interference, relative to step {steps[0]}", fontsize=11)
    for axes in (rank, energy, together):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    canvas.savefig(folder / FIGURE, dpi=130)


def _steps_axis(axes: Any, steps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("training step")
