"""A study's figures: the curve of each arm, each task's curve, and the arms side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeready.study.cells import EXPERT
from mergeready.study.results import Results, Sample
from mergeready.study.tables import merge_labels
from mergeready.training.figures import EXPERT_COLOR, MARK_COLOR

# A method has one colour in all studies; others share what is left, in their order.
_COLORS = {
    "average": "#d1495b",
    "task_arithmetic": "#e59500",
    "ties": "#2a9d8f",
    "tsv_m": "#7b4fa3",
    "dare_ties": "#8a6d3b",
}
_MORE_COLORS = ("#5c8001", "#c2185b", "#455a64", "#00838f", "#ad8b00")
_BANDS = "bands: 95 % intervals"
_DIAMONDS = "diamonds: the step that validation data choose"


def draw_study(results: Results, folder: Path) -> list[Path]:
    """Draw all figures as PNG and SVG.

    Returns:
        The files.
    """
    if not results.contents:
        return []
    arms = results.labels("arm")
    drawn = [_draw_curves(results, arms, folder), _draw_tasks(results, arms[0], folder)]
    if len(arms) > 1:
        drawn.append(_draw_arms(results, arms, folder))
    return [path for paths in drawn for path in paths]


def _draw_curves(results: Results, arms: Sequence[str], folder: Path) -> list[Path]:
    columns = min(len(arms), 3)
    grid = math.ceil(len(arms) / columns), columns
    figure = _figure(max(5.2 * columns, 7.5), 4.6 * grid[0] + 0.5)
    panels = figure.subplots(*grid, sharey=True, squeeze=False).ravel()
    for axes, arm in zip(panels, arms, strict=False):
        steps = results.steps(arm)
        base = results.base(arm, steps[-1])
        if base is not None:
            axes.axhline(base.value, color=MARK_COLOR, linestyle=":", linewidth=1.2, label="base")
        for method, color in _colors(results).items():
            samples = {step: results.sample(arm, step, method) for step in steps}
            _line(axes, {step: s for step, s in samples.items() if s is not None}, color, _label(method))
            best = results.best_step(arm, method)
            found = None if best is None else results.sample(arm, best, method)
            if found is not None and len(steps) > 1:
                axes.plot(
                    best, found.value, "D", color=color, markersize=8, markerfacecolor="white", zorder=3
                )
        _step_axis(axes, steps)
        axes.set_title(arm, fontsize=11)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(f"test {results.metric}, mean over tasks")
        _keep_possible(axes.set_ylim, axes.get_ylim(), results.metric)
    chosen = any(len(results.steps(arm)) > 1 for arm in arms)
    _legend(figure, panels[0], "; ".join([_BANDS, *([_DIAMONDS] if chosen else [])]))
    return _save(figure, folder, "curves")


def _draw_tasks(results: Results, arm: str, folder: Path) -> list[Path]:
    steps = results.steps(arm)
    expert = results.sample(arm, steps[-1], EXPERT)
    tasks = [] if expert is None else list(expert.values)
    columns = min(len(tasks), 4)
    grid = math.ceil(len(tasks) / columns), columns
    figure = _figure(max(3.4 * columns, 7.5), 2.9 * grid[0] + 0.6)
    panels = figure.subplots(*grid, squeeze=False).ravel()
    for axes, task in zip(panels, tasks, strict=False):
        for method, color in _colors(results).items():
            samples = {step: results.sample(arm, step, method) for step in steps}
            known = {s: Sample({task: v.values[task]}) for s, v in samples.items() if v and task in v.values}
            _line(axes, known, color, _label(method), band=False)
        base = results.base(arm, steps[-1])
        if base is not None:
            axes.axhline(
                Sample({task: base.values[task]}).value,
                color=MARK_COLOR,
                linestyle=":",
                linewidth=1.2,
                label="base",
            )
        _step_axis(axes, steps)
        axes.set_title(task.replace("_", " "), fontsize=10)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.supylabel(f"test {results.metric} ({arm})", fontsize=10)
    _legend(figure, panels[0], None)
    return _save(figure, folder, "tasks")


def _draw_arms(results: Results, arms: Sequence[str], folder: Path) -> list[Path]:
    figure = _figure(9.5, 1.6 + 0.5 * len(arms))
    axes = figure.subplots()
    colors = _colors(results)
    notes = ["dots: the end of training", "lines: 95 % intervals"]
    for row, arm in enumerate(arms):
        end = results.steps(arm)[-1]
        for index, (method, color) in enumerate(colors.items()):
            height = row + (index - (len(colors) - 1) / 2) * 0.12
            sample = results.sample(arm, end, method)
            if sample is None:
                continue
            estimate = sample.estimate()
            low, high = estimate.low, estimate.high
            if low is not None and high is not None:
                axes.plot([low, high], [height, height], color=color, linewidth=1, alpha=0.5)
            axes.plot(
                estimate.value,
                height,
                "o",
                color=color,
                markersize=6,
                label=_label(method) if not row else None,
            )
            best = results.best_step(arm, method)
            chosen = None if best is None else results.sample(arm, best, method)
            if chosen is not None and best != end:
                notes = [*notes[:2], _DIAMONDS]
                axes.plot(
                    chosen.value, height, "D", color=color, markersize=5, markerfacecolor="white", zorder=3
                )
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"test {results.metric}, mean over tasks")
    _keep_possible(axes.set_xlim, axes.get_xlim(), results.metric)
    _plain_frame(axes)
    _legend(figure, axes, "; ".join(notes))
    return _save(figure, folder, "arms")


def _colors(results: Results) -> dict[str, str]:
    methods = merge_labels(results)
    more = itertools.cycle(_MORE_COLORS)
    return {EXPERT: EXPERT_COLOR} | {method: _COLORS.get(method) or next(more) for method in methods}


def _label(method: str) -> str:
    return "experts" if method == EXPERT else method


def _line(axes: Any, samples: Mapping[int, Sample], color: str, label: str, *, band: bool = True) -> None:
    if not samples:
        return
    steps, estimates = list(samples), [sample.estimate() for sample in samples.values()]
    axes.plot(
        steps, [e.value for e in estimates], "-o", color=color, markersize=3.5, linewidth=1.6, label=label
    )
    if band and all(e.low is not None for e in estimates):
        axes.fill_between(
            steps,
            [e.low for e in estimates],
            [e.high for e in estimates],
            color=color,
            alpha=0.1,
            linewidth=0,
        )


def _step_axis(axes: Any, steps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("training step")
    axes.grid(alpha=0.25)
    _plain_frame(axes)


def _keep_possible(set_limits: Any, limits: tuple[float, float], metric: str | None) -> None:
    """Intervals of few seeds reach beyond what an accuracy can be, and would press all values into a strip."""
    if "accuracy" in (metric or ""):
        set_limits(max(limits[0], -0.02), min(limits[1], 1.02))


def _plain_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, axes: Any, title: str | None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), max(2, int(figure.get_size_inches()[0] / 1.9))),
        frameon=False,
        title=title,
        title_fontsize=9,
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context({"svg.hashsalt": "mergeready"}):
        for path in paths:
            figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
