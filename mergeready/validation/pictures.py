"""The figures of a report: as SVG for its page, and as PNG for the model card."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergeready.metrics.compare import Pairs
from mergeready.metrics.heatmap import draw_pairs
from mergeready.training.figures import MARK_COLOR, draw_curve, draw_growth
from mergeready.training.history import History
from mergeready.training.probe import OWN

_INK = "#010203"  # stands for the page's text colour, which differs between light and dark
_STYLE = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "mergeready",  # or ids, and so the page, differ from time to time
    "font.family": "sans-serif",
}


def figures(history: History | None, pairs: Pairs | None) -> dict[str, Callable[[Any], None]]:
    """What can be drawn, by title: functions that fill a Matplotlib figure."""
    made: dict[str, Callable[[Any], None]] = {}
    if history is not None:
        for method in history.methods:
            if any(method in probe.merges for probe in history.probes):
                made[f"Its own task while it trained: expert, and merged with {method}"] = _curve(
                    history, method
                )
                made[f"What each task keeps, merged with {method}"] = _retention(history, method)
        if sum(bool(record.layers) for record in history.metrics) > 1:  # one step shows no growth
            made["Growth of the task vector by layer"] = _growth(history)
    if pairs is not None:
        made["Interference with peers"] = lambda figure: draw_pairs(figure, pairs)
    return made


def to_svg(draw: Callable[[Any], None], prefix: str) -> str:
    """A figure as SVG to stand inside a page, in the page's own text colour, ids beginning with ``prefix``."""
    import matplotlib

    buffer, figure = io.StringIO(), _make(draw)
    with matplotlib.rc_context(_STYLE):  # text and ids are settled when it is written
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(MARK_COLOR, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", _with_prefix(text, prefix), count=1
    )


def save_pngs(drawings: Mapping[str, Callable[[Any], None]], folder: Path) -> list[Path]:
    """Write figures as PNG, for the model card; returns their paths."""
    paths = []
    for title, draw in drawings.items():
        path = folder / (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".png")
        _make(draw, plain=True).savefig(path, dpi=130)
        paths.append(path)
    return paths


def _make(draw: Callable[[Any], None], *, plain: bool = False) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({} if plain else _STYLE):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        draw(figure)
    return figure


def _growth(history: History) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        draw_growth(axes, history)
        axes.set_title("")  # the page names its figures

    return draw


def _curve(history: History, method: str) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        draw_curve(axes, history, method)
        axes.set_xlabel("training step")
        axes.set_ylabel((history.start.metric if history.start else None) or "metric")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)

    return draw


def _retention(history: History, method: str) -> Callable[[Any], None]:
    """Base, expert and merged metric of every task at the newest probe, side by side."""

    def draw(figure: Any) -> None:
        tasks = next(p for p in reversed(history.probes) if method in p.merges).merges[method].tasks
        figure.set_size_inches(6.4, 1.6 + 0.4 * len(tasks))
        axes = figure.subplots()
        names = ["this expert" if name == OWN else name.rstrip("/").rpartition("/")[2] for name in tasks]
        rows = range(len(names))
        for row, result in zip(rows, tasks.values(), strict=True):
            axes.plot(
                [result.base, result.expert], [row, row], color="#999999", linewidth=5, alpha=0.35, zorder=1
            )
        values = list(tasks.values())
        axes.plot([r.base for r in values], rows, "o", markerfacecolor="none", color="#777777", label="base")
        axes.plot([r.expert for r in values], rows, "o", color="#1f6fb4", label="expert")
        axes.plot([r.merged.value for r in values], rows, "D", color="#d1495b", label="merged")
        axes.set_yticks(list(rows), names, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel((history.start.metric if history.start else None) or "metric")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    return draw


def _with_prefix(text: str, prefix: str) -> str:
    """Several SVGs in one page must not share ids: each gets a prefix of its own."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}-\2"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
