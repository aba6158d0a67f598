from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeready.metrics.compare import Pairs
from mergeready.metrics.labels import short_labels

_MOST_NUMBERS = 24
"""Experts up to which each cell says its number."""
_MOST_LABELS = 100
"""Experts up to which rows and columns have names."""


def draw_heatmaps(comparison: Pairs, path: Path) -> None:
    """Draw cosine, sign conflict and norm ratio of every pair side by side; the file's suffix is the format."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw_pairs(figure, comparison)
    figure.savefig(path, dpi=150)


def draw_pairs(figure: Any, comparison: Pairs) -> None:
    """Fill a Matplotlib figure with the three heatmaps; it grows with the number of experts, up to a hundred."""
    labels = short_labels(comparison.labels)
    ratios = [
        [max(a, b) / min(a, b) if min(a, b) else float("inf") for b in comparison.norms]
        for a in comparison.norms
    ]
    size = 2.4 + (
        0.55 * len(labels) if len(labels) <= _MOST_NUMBERS else 0.12 * min(len(labels), _MOST_LABELS)
    )
    figure.set_size_inches(3 * size, size + 0.6)
    panels: Any = figure.subplots(1, 3)
    _panel(panels[0], comparison.cosine, labels, "cosine", "RdBu_r", (-1.0, 1.0))
    _panel(panels[1], comparison.sign_conflict, labels, "sign conflict (0.5 by chance)", "RdBu_r", (0.0, 1.0))
    _panel(panels[2], ratios, labels, "norm ratio", "Purples", (1.0, max(5.0, *(max(row) for row in ratios))))


def _panel(
    axes: Any, values: Sequence[Sequence[float]], labels: Sequence[str], title: str, colors: str, limits: Any
) -> None:
    axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, fontsize=11)
    positions = range(len(labels))
    small = {"fontsize": 6} if len(labels) > _MOST_NUMBERS else {}
    shown = positions if len(labels) <= _MOST_LABELS else range(0)
    axes.set_xticks(shown, [labels[i] for i in shown], rotation=45 if not small else 90, ha="right", **small)
    axes.set_yticks(shown, [labels[i] for i in shown], **small)
    if small:
        return
    middle, half = (limits[0] + limits[1]) / 2, (limits[1] - limits[0]) / 2
    for row in positions:
        for column in positions:
            value = values[row][column]
            strong = abs(value - middle) > 0.6 * half and (colors != "Purples" or value > middle)
            axes.text(
                column,
                row,
                f"{value:z.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if strong else "black",
            )
