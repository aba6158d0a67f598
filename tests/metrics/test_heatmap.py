from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from mergeready.metrics.compare import compare_vectors
from mergeready.metrics.heatmap import draw_heatmaps, draw_pairs
from tests.metrics.chunks import base_of, task_vectors


@pytest.mark.parametrize("zero", [False, True])
def test_a_picture_is_drawn(tmp_path: Path, zero: bool) -> None:
    found = [{"x": torch.randn(50)}, {"x": torch.zeros(50) if zero else torch.randn(50)}]
    draw_heatmaps(compare_vectors(task_vectors(found), base_of(found[0])), tmp_path / "picture.png")
    picture = imread(tmp_path / "picture.png")
    assert picture.shape[0] > 100
    assert picture.shape[1] > 2 * picture.shape[0]  # three panels side by side
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::97].tolist()}) > 3


def test_a_cosine_just_below_zero_is_shown_as_zero() -> None:
    found = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([-0.001, 1.0])}]
    figure = Figure()
    draw_pairs(figure, compare_vectors(task_vectors(found), base_of(found[0])))
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"0.00"}


def test_red_is_opposed_in_both_panels_and_colours_reach_as_far_as_pairs_do() -> None:
    found = [
        {"x": torch.tensor([1.0, 0.3])},
        {"x": torch.tensor([-1.0, 0.4])},
        {"x": torch.tensor([1.0, 0.0])},
    ]
    figure = Figure()
    draw_pairs(figure, compare_vectors(task_vectors(found), base_of(found[0])))
    for axes in figure.axes[:2]:
        image = axes.get_images()[0]
        red, _, blue, _ = image.cmap(image.norm(image.get_array()))[0][1]  # the first two disagree on signs
        assert red > blue, axes.get_title()
    assert figure.axes[0].get_images()[0].get_clim() == (-1.0, 1.0)
    assert np.isnan(figure.axes[0].get_images()[0].get_array().filled(np.nan).diagonal()).all()


def test_what_is_not_known_is_a_dash() -> None:
    found = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.zeros(2)}]
    figure = Figure()
    draw_pairs(figure, compare_vectors(task_vectors(found), base_of(found[0])))
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"–"}


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    found = compare_vectors(task_vectors([{"x": torch.randn(9)}] * 2), base_of({"x": torch.randn(9)}))
    draw_heatmaps(replace(found, labels=["$\\frac{$", "a_$5_$6"]), tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").shape[0] > 100
