"""Draws the diagrams of the concepts page when the pages are built."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib as mpl
import mkdocs_gen_files
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET = "#263238", "#78909c"
BLUE, ORANGE, GREEN = "#3949ab", "#ef6c00", "#2e7d32"
mpl.rcParams["svg.hashsalt"] = "mergeready"


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-"
) -> None:
    properties = {"arrowstyle": "-|>", "color": color, "lw": 2, "linestyle": style, "mutation_scale": 16}
    axes.annotate("", end, start, arrowprops={**properties, "shrinkA": 0, "shrinkB": 0})


def task_vectors(figure: Figure) -> None:
    axes = figure.add_axes((0, 0, 1, 1))
    base, first, second = (0.8, 0.7), (4.2, 1.3), (2.4, 3.5)
    total = (first[0] + second[0] - base[0], first[1] + second[1] - base[1])
    scaled = tuple(b + 0.6 * (t - b) for b, t in zip(base, total, strict=True))
    arrow(axes, base, first, BLUE)
    arrow(axes, base, second, GREEN)
    arrow(axes, base, total, QUIET, ":")
    arrow(axes, base, scaled, ORANGE)  # type: ignore[arg-type]
    for point in (base, first, second, scaled):
        axes.plot(*point, "o", color=INK, ms=6, zorder=5)
    text = axes.text
    text(base[0], base[1] - 0.35, "base θ₀", ha="center", color=INK)
    text(first[0] + 0.15, first[1] - 0.1, "expert θ₁", color=BLUE)
    text(second[0] - 0.15, second[1] + 0.15, "expert θ₂", color=GREEN, ha="right")
    text(2.7, 0.75, "τ₁", color=BLUE)
    text(1.2, 2.2, "τ₂", color=GREEN)
    text(scaled[0] + 0.2, scaled[1] - 0.15, "merge: θ₀ + scale · (τ₁ + τ₂)", color=ORANGE)
    text(total[0] - 0.35, total[1] + 0.05, "scale = 1", color=QUIET, ha="right", fontsize=10)
    axes.set(xlim=(0, 7.6), ylim=(0, 4.4))
    axes.axis("off")


def probe(figure: Figure) -> None:
    axes = figure.add_axes((0, 0, 1, 1))
    steps = [
        ("training", "step t", BLUE),
        ("merge in place", "with the peers", ORANGE),
        ("evaluate", "each task, a few scales", ORANGE),
        ("restore", "bit for bit", ORANGE),
        ("training", "step t + 1", BLUE),
    ]
    for index, (title, below, color) in enumerate(steps):
        x = 1.55 * index
        axes.add_patch(
            mpl.patches.FancyBboxPatch((x, 0.5), 1.15, 0.9, "round,pad=0.05", fc="white", ec=color, lw=2)
        )
        axes.text(x + 0.575, 1.08, title, ha="center", va="center", color=INK, fontsize=10.5, weight="bold")
        axes.text(x + 0.575, 0.78, below, ha="center", va="center", color=QUIET, fontsize=8)
        if index:
            arrow(axes, (x - 0.33, 0.95), (x - 0.07, 0.95), QUIET)
    left, right, low = 0.575, 0.575 + 1.55 * 4, 0.1
    axes.plot([left, left, right], [0.42, low, low], color=QUIET, lw=1.2)
    arrow(axes, (right, low - 0.01), (right, 0.44), QUIET)
    axes.text((left + right) / 2, low - 0.1, "training never notices", ha="center", va="top", color=QUIET)
    axes.set(xlim=(-0.15, 7.5), ylim=(-0.4, 1.65))
    axes.axis("off")


PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "task_vectors": (task_vectors, (7.6, 4.4)),
    "probe": (probe, (9.2, 2.4)),
}

for name, (draw, size) in PICTURES.items():
    figure = Figure(size)
    draw(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    with mkdocs_gen_files.open(f"pictures/{name}.svg", "wb") as file:
        file.write(stream.getvalue())
