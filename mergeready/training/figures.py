from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergeready.training.history import History
from mergeready.training.probe import OWN
from mergeready.training.records import Estimate

EXPERT_COLOR = "#1f6fb4"
MERGED_COLOR = "#d1495b"
MARK_COLOR = "#444444"


def draw_curve(axes: Any, history: History, method: str, *, task: str = OWN, pick: int | None = None) -> None:
    """Draw a composability curve: the expert's and the merged model's metric against the training step.

    Args:
        axes: Matplotlib axes.
        history: The run.
        method: Label of the merge method.
        task: Whose metric; the run's own by default.
        pick: Step of the picked checkpoint, to mark.
    """
    probes = [probe for probe in history.probes if method in probe.merges]
    steps = [probe.step for probe in probes]
    results = [probe.merges[method].tasks[task] for probe in probes]
    merged = [result.merged for result in results]
    expert = [
        probe.expert if task == OWN else Estimate(value=r.expert)
        for probe, r in zip(probes, results, strict=True)
    ]
    _line(axes, steps, expert, EXPERT_COLOR, "expert")
    # A member of a team has no peers in its first round.
    for surrogate, label, style in ((True, "merged with surrogates", "--o"), (False, "merged", "-o")):
        at = [i for i, probe in enumerate(probes) if probe.surrogate == surrogate]
        if at or not (surrogate or probes):
            _line(axes, [steps[i] for i in at], [merged[i] for i in at], MERGED_COLOR, label, style)
    if probes:
        axes.axhline(results[-1].base, color=MARK_COLOR, linewidth=1, linestyle=":", label="base")
    stops = [decision.step for decision in history.decisions]
    if stops:
        axes.axvline(stops[0], color=MARK_COLOR, linewidth=1, linestyle="--", label="stopped")
    if pick is not None and pick in steps:
        axes.plot(pick, merged[steps.index(pick)].value, "D", color=MERGED_COLOR, markersize=7, label="pick")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _line(
    axes: Any, steps: list[int], values: list[Estimate], color: str, label: str, style: str = "-o"
) -> None:
    axes.plot(
        steps, [v.value for v in values], style, color=color, markersize=3.5, linewidth=1.6, label=label
    )
    if values and all(v.low is not None and v.high is not None for v in values):
        axes.fill_between(steps, [v.low for v in values], [v.high for v in values], color=color, alpha=0.13)


def draw_growth(axes: Any, history: History) -> None:
    """Draw how the task vector grows by layer: a heatmap of ‖τ‖ over layers and measured steps.

    Args:
        axes: Matplotlib axes.
        history: The run. Steps stand side by side, as they were measured; layers that were not trained are white.
    """
    measured = [record for record in history.metrics if record.layers]
    layers = sorted({layer for record in measured for layer in record.layers})
    norms = [[record.layers.get(layer, math.nan) for record in measured] for layer in layers]
    image = axes.imshow(norms, aspect="auto", origin="lower", cmap="viridis", vmin=0, interpolation="nearest")
    _sparse_ticks(axes.set_xticks, [record.step for record in measured])
    _sparse_ticks(axes.set_yticks, layers)
    axes.set_xlabel("training step")
    axes.set_ylabel("layer")
    axes.set_title("growth of the task vector by layer", fontsize=11)
    axes.figure.colorbar(image, ax=axes, label="‖τ‖")


def _sparse_ticks(set_ticks: Any, labels: Sequence[int], most: int = 12) -> None:
    chosen = range(0, len(labels), math.ceil(len(labels) / most))
    set_ticks(list(chosen), [str(labels[index]) for index in chosen])
