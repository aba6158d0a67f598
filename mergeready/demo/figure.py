from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeready.demo.experts import TrainedExpert
from mergeready.demo.results import DemoResults
from mergeready.training.figures import EXPERT_COLOR, MARK_COLOR, MERGED_COLOR, draw_curve
from mergeready.training.records import Estimate


def draw(experts: Sequence[TrainedExpert], results: DemoResults, method: str, folder: Path) -> list[Path]:
    """Draw the demo's picture as PNG and SVG.

    Above, each expert's composability curve; below, the test accuracies of what merging gave.

    Returns:
        The files.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    top, bottom = parts
    top.suptitle(f"While each expert trains: expert and merged accuracy ({method}, validation)", fontsize=12)
    panels = top.subplots(1, len(experts), sharey=True)
    for axes, expert in zip(panels, experts, strict=True):
        draw_curve(axes, expert.history, method, pick=expert.pick_steps[method])
        axes.set_title(expert.task.name.replace("_", " "), fontsize=11)
        axes.set_xlabel("training step")
    panels[0].set_ylabel("accuracy")
    _shared_legend(top, panels)
    bottom.suptitle(
        "After training: all experts merged into one model (test accuracy, 95 % intervals)", fontsize=12
    )
    _draw_table(bottom.subplots(1, 1), results, method)
    paths = [folder / "composability.png", folder / "composability.svg"]
    with mpl.rc_context({"svg.hashsalt": "mergeready"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _draw_table(axes: Any, results: DemoResults, method: str) -> None:
    rows: list[tuple[str, Mapping[str, Estimate], str, str]] = [
        ("base", results.base, MARK_COLOR, "o"),
        ("merged from ends", results.ends[method].tasks, MERGED_COLOR, "s"),
        ("merged from picks", results.picks[method].tasks, MERGED_COLOR, "D"),
        ("each expert at its end", results.experts, EXPERT_COLOR, "o"),
    ]
    if results.joint is not None:
        rows.append(("trained jointly", results.joint, "#2a9d8f", "^"))
    names = [*results.base, "mean"]
    width = 0.14
    for index, (label, values, color, marker) in enumerate(rows):
        offset = (index - (len(rows) - 1) / 2) * width
        estimates = [*values.values()]
        heights = [*(e.value for e in estimates), sum(e.value for e in estimates) / len(estimates)]
        spread = [_bars(e) for e in estimates] + [(0.0, 0.0)]
        axes.errorbar(
            [position + offset for position in range(len(names))],
            heights,
            yerr=[[low for low, _ in spread], [high for _, high in spread]],
            fmt=marker,
            color=color,
            markerfacecolor="white" if label in ("base", "merged from ends") else color,
            markersize=7,
            capsize=2,
            linewidth=1,
            label=label,
        )
        axes.annotate(
            f"{heights[-1]:.3f}",
            (len(names) - 1 + offset, heights[-1]),
            xytext=(0, 8 if index % 2 == 0 else -15),  # neighbours may be level
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,  # or nobody knows whose number it is
        )
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.axvline(len(names) - 1.5, color=MARK_COLOR, linewidth=0.8, alpha=0.4)
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bars(estimate: Estimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        return 0.0, 0.0
    return estimate.value - estimate.low, estimate.high - estimate.value


def _shared_legend(figure: Any, panels: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False
    )
