from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mergeready.training.figures import draw_curve
from mergeready.training.history import History
from mergeready.training.records import DecisionRecord, Estimate, ProbeRecord, TaskResult
from tests.training.histories import probe, start


def draw(history: History, **options: Any) -> Any:
    figure = Figure()
    axes = figure.subplots()
    draw_curve(axes, history, "ties", **options)
    figure.savefig(io.BytesIO())
    return axes


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    [found] = [line for line in axes.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(axes: Any) -> list[str]:
    return [line.get_label() for line in axes.get_lines()]


def with_tasks(record: ProbeRecord, **tasks: TaskResult) -> ProbeRecord:
    merges = {name: dataclasses.replace(merge, tasks=tasks) for name, merge in record.merges.items()}
    return dataclasses.replace(record, merges=merges)


def result(
    base: float, expert: float, merged: float, low: float | None = None, high: float | None = None
) -> TaskResult:
    estimate = Estimate(value=merged, n=9, low=low, high=high)
    return TaskResult(base=base, expert=expert, merged=estimate, retention=None, normalised=None)


@pytest.fixture
def history() -> History:
    return History(
        [
            start("ties", "average"),
            with_tasks(
                probe(1, 0.5, ties=0.9, average=0.0), own=result(0.25, 0.5, 0.4), law=result(0.1, 0.8, 0.3)
            ),
            with_tasks(
                probe(2, 0.6, ties=0.9, average=0.0), own=result(0.25, 0.6, 0.45), law=result(0.1, 0.8, 0.2)
            ),
            with_tasks(
                probe(8, 0.7, ties=0.9, average=0.0), own=result(0.25, 0.7, 0.35), law=result(0.1, 0.8, 0.1)
            ),
        ]
    )


def test_the_curves_hold_the_own_tasks_numbers(history: History) -> None:
    axes = draw(history)
    assert line(axes, "expert") == ([1, 2, 8], [0.5, 0.6, 0.7])
    assert line(axes, "merged") == ([1, 2, 8], [0.4, 0.45, 0.35])
    assert line(axes, "base")[1] == [0.25, 0.25]
    assert set(labels(axes)) == {"expert", "merged", "base"}


def test_a_peers_task_is_shown_with_the_peers_own_expert(history: History) -> None:
    axes = draw(history, task="law")
    assert line(axes, "expert") == ([1, 2, 8], [0.8, 0.8, 0.8])
    assert line(axes, "merged") == ([1, 2, 8], [0.3, 0.2, 0.1])
    assert line(axes, "base")[1] == [0.1, 0.1]


def test_steps_are_on_a_logarithmic_axis_with_plain_numbers(history: History) -> None:
    axes = draw(history)
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_transform().base == 2
    assert axes.xaxis.get_major_formatter()(64.0, 0) == "64"


def test_surrogates_are_named() -> None:
    axes = draw(History([start("ties"), probe(1, 0.5, surrogate=True, ties=0.4)]))
    assert line(axes, "merged with surrogates") == ([1], [0.4])
    assert "merged" not in labels(axes)


def test_what_was_merged_with_peers_is_told_from_what_was_not() -> None:
    probes = [
        probe(1, 0.5, surrogate=True, ties=0.4),
        probe(2, 0.6, surrogate=True, ties=0.5),
        probe(4, 0.7, ties=0.3),
    ]
    axes = draw(History([start("ties"), *probes]))
    assert line(axes, "merged with surrogates") == ([1, 2], [0.4, 0.5])
    assert line(axes, "merged") == ([4], [0.3])
    assert line(axes, "expert")[0] == [1, 2, 4]


def test_the_first_stop_is_marked(history: History) -> None:
    assert "stopped" not in labels(draw(history))
    for step in (9, 10):
        history.append(DecisionRecord(step=step, reason="enough", acted=False))
    assert line(draw(history), "stopped")[0] == [9, 9]


def test_the_pick_is_marked_on_the_merged_curve(history: History) -> None:
    assert line(draw(history, pick=2), "pick") == ([2], [0.45])
    assert line(draw(history, task="law", pick=8), "pick") == ([8], [0.1])


@pytest.mark.parametrize("pick", [None, 5])
def test_a_step_that_was_not_probed_is_not_marked(history: History, pick: int | None) -> None:
    assert "pick" not in labels(draw(history, pick=pick))


def test_probes_without_the_method_are_left_out(history: History) -> None:
    history.append(probe(16, 0.9, average=0.1))
    assert line(draw(history), "expert")[0] == [1, 2, 8]


def test_intervals_are_shaded_where_every_probe_has_one() -> None:
    probes = [
        with_tasks(probe(1, 0.5, ties=0.4), own=result(0.25, 0.5, 0.4, 0.3, 0.5)),
        with_tasks(probe(2, 0.5, ties=0.4), own=result(0.25, 0.5, 0.4, 0.35, 0.45)),
    ]
    [band] = draw(History([start("ties"), *probes])).collections
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert {(1.0, 0.3), (1.0, 0.5), (2.0, 0.35), (2.0, 0.45)} <= corners
    probes.append(with_tasks(probe(3, 0.5, ties=0.4), own=result(0.25, 0.5, 0.4)))
    assert not draw(History([start("ties"), *probes])).collections


def test_a_run_without_probes_is_an_empty_picture() -> None:
    axes = draw(History([start("ties")]))
    assert line(axes, "expert") == ([], [])
    assert "base" not in labels(axes)
