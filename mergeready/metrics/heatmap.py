from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeready.metrics.compare import Pairs
from mergeready.metrics.labels import short_labels

_MOST_NUMBERS = 24
"""Experts up to which each cell says its number."""
_MOST_LABELS = 100
"""Experts up to which rows and columns have names."""
_LONG = 14
"""Characters from which names of columns stand upright: slanted ones would reach into the panel beside."""
_OPPOSED_IS_RED = {"cosine": "RdBu", "sign conflict": "RdBu_r"}


def draw_heatmaps(comparison: Pairs, path: Path) -> None:
    """Draw cosine, sign conflict and norm ratio of every pair side by side; the file's suffix is the format."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw_pairs(figure, comparison)
    figure.savefig(path, dpi=150)


def draw_pairs(figure: Any, comparison: Pairs) -> None:
    """Fill a Matplotlib figure with the three heatmaps; it grows with the number of experts, up to a hundred.

    Red is what opposes, in cosines and in sign conflicts. Colours reach as far as the pairs do, since
    those of fine-tuned experts lie close to 0; an expert beside itself is left grey.
    """
    labels = short_labels(comparison.labels)
    ratios = [
        [max(a, b) / min(a, b) if min(a, b) else math.nan for b in comparison.norms] for a in comparison.norms
    ]
    _set_size(figure, labels)
    panels: Any = figure.subplots(1, 3)
    reach = _reach(comparison.cosine, 0.0, 0.1)
    _panel(panels[0], comparison.cosine, labels, "cosine", _OPPOSED_IS_RED["cosine"], (-reach, reach))
    reach = _reach(comparison.sign_conflict, 0.5, 0.05)
    _panel(
        panels[1],
        comparison.sign_conflict,
        labels,
        "sign conflict (0.5 by chance)",
        _OPPOSED_IS_RED["sign conflict"],
        (0.5 - reach, 0.5 + reach),
    )
    _panel(panels[2], ratios, labels, "norm ratio", "Purples", (1.0, max([5.0, *_between(ratios)])))
    for axes in panels[1:]:
        axes.set_yticklabels([])  # the first panel names the rows of all


def _set_size(figure: Any, labels: Sequence[str]) -> None:
    """In inches: three squares, bars of colours, and room for names at the left and below."""
    count = len(labels)
    if count > _MOST_LABELS:
        side, names, turned = 6.0, 0.0, 0.0
    else:
        few = count <= _MOST_NUMBERS
        side = max(1.7, (0.55 if few else 0.12) * count)
        names = (0.085 if few else 0.05) * max(map(len, labels)) + 0.2
        turned = names * (math.sqrt(0.5) if few and max(map(len, labels)) < _LONG else 1.0)
    figure.set_size_inches(3 * (side + 0.8) + names, side + turned + 0.45)


def _between(values: Sequence[Sequence[float]]) -> list[float]:
    """Of pairs of two different experts, those that are known."""
    return [
        value
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if i != j and math.isfinite(value)
    ]


def _reach(values: Sequence[Sequence[float]], middle: float, step: float) -> float:
    """How far the pairs lie from the middle at most, in whole steps."""
    farthest = max((abs(value - middle) for value in _between(values)), default=0.0)
    return step * max(1, math.ceil(round(farthest / step, 6)))


def _panel(
    axes: Any, values: Sequence[Sequence[float]], labels: Sequence[str], title: str, colors: str, limits: Any
) -> None:
    positions = range(len(labels))
    shown = [[math.nan if i == j else values[i][j] for j in positions] for i in positions]
    axes.set_facecolor("#d5d8db")
    image = axes.imshow(shown, cmap=colors, vmin=limits[0], vmax=limits[1])
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    many = len(labels) > _MOST_NUMBERS
    axes.set_title(title, fontsize=14 if many else 11)
    bar.ax.tick_params(labelsize=10 if many else 8)
    small = {"fontsize": 6} if many else {}
    named = positions if len(labels) <= _MOST_LABELS else range(0)
    upright = many or max(map(len, labels)) >= _LONG
    turn = {"rotation": 90} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    # Names are no formulas, whatever dollars they hold.
    axes.set_xticks(named, [labels[i] for i in named], parse_math=False, **turn, **small)
    axes.set_yticks(named, [labels[i] for i in named], parse_math=False, **small)
    if many:
        return
    for row in positions:
        for column in positions:
            if row != column:
                value = shown[row][column]
                text = f"{value:z.2f}".replace("-", "−") if math.isfinite(value) else "–"
                color = _ink(image, value)
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)


def _ink(image: Any, value: float) -> str:
    """White on dark cells, black on others."""
    if not math.isfinite(value):
        return "black"
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
