"""Pictures of a run as arrays, which is what loggers take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import uint8
from numpy.typing import NDArray

from mergeready.training.figures import draw_curve, draw_growth
from mergeready.training.history import History
from mergeready.training.scalars import PREFIX

FIGURES = f"{PREFIX}figures/"
DPI = 100


def run_images(history: History) -> dict[str, NDArray[uint8]]:
    """A composability curve per merge method and the growth by layer, as far as the history holds them.

    Returns:
        RGB arrays, height × width × 3, by names that start with ``mergeready/figures/``, which no scalar has.
    """
    from matplotlib.figure import Figure

    images: dict[str, NDArray[uint8]] = {}
    for method in history.methods:
        figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        draw_curve(axes, history, method)
        axes.set_title(f"expert and merged with {method}", fontsize=11)
        axes.set_xlabel("training step")
        axes.set_ylabel((history.start.metric if history.start else None) or "metric")
        axes.legend(frameon=False)
        images[f"{FIGURES}curve/{method}"] = _pixels(figure)
    layers = {layer for record in history.metrics for layer in record.layers}
    if layers:
        figure = Figure(figsize=(6.4, min(2.2 + 0.22 * len(layers), 12)), dpi=DPI, layout="constrained")
        draw_growth(figure.subplots(), history)
        images[f"{FIGURES}growth"] = _pixels(figure)
    return images


def _pixels(figure: Any) -> NDArray[uint8]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
