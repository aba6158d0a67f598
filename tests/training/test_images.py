from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from mergeready.training.figures import draw_growth
from mergeready.training.history import History
from mergeready.training.images import run_images
from mergeready.training.records import MetricsRecord
from mergeready.training.scalars import scalars
from tests.training.histories import curves


def grown(step: int, **layers: float) -> MetricsRecord:
    return MetricsRecord(
        step=step,
        norm=1.0,
        relative_norm=0.1,
        growth=0.0,
        groups={},
        layers={int(name.removeprefix("layer")): value for name, value in layers.items()},
        top_mass={},
    )


def test_one_curve_a_method_and_the_growth() -> None:
    history = curves(ties=[0.1, 0.4], average=[0.2, 0.3])
    history.append(grown(20, layer0=1.0, layer1=2.0))
    images = run_images(history)
    assert set(images) == {
        "mergeready/figures/curve/ties",
        "mergeready/figures/curve/average",
        "mergeready/figures/growth",
    }
    for image in images.values():
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert len(np.unique(image)) > 10  # something is drawn


def test_no_image_is_called_like_a_scalar() -> None:
    """Loggers keep one kind of value under a name."""
    history = curves(ties=[0.1, 0.4])
    history.append(grown(20, layer0=1.0))
    names = {name for record in history for name in scalars(record)}
    assert "mergeready/growth" in names
    assert not names & set(run_images(history))


def test_what_the_history_lacks_is_not_drawn() -> None:
    assert run_images(History()) == {}
    assert set(run_images(curves(ties=[0.1]))) == {"mergeready/figures/curve/ties"}


def test_many_layers_stay_one_reasonable_picture() -> None:
    layers = {f"layer{index}": float(index) for index in range(126)}
    [image] = run_images(History([grown(1, **layers), grown(2, **layers)])).values()
    assert image.shape[0] <= 1200


def test_the_heatmap_shows_each_layers_norm_at_each_step() -> None:
    axes = Figure().subplots()
    draw_growth(
        axes, History([grown(1, layer0=0.5, layer2=1.0), grown(4, layer0=2.0, layer2=3.0, layer7=1.5)])
    )
    [image] = axes.get_images()
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[0.5, 2.0], [1.0, 3.0], [np.nan, 1.5]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "7"]
    assert image.get_clim()[0] == 0


@pytest.mark.parametrize("count", [1, 12, 13, 100])
def test_ticks_stay_readable(count: int) -> None:
    axes = Figure().subplots()
    draw_growth(axes, History([grown(step, layer0=1.0) for step in range(1, count + 1)]))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 1 <= len(labels) <= 12
    assert labels[0] == "1"
