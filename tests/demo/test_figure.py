from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mergeready.demo.experts import TrainedExpert
from mergeready.demo.figure import draw
from mergeready.training.history import History
from tests.demo.test_display import estimate, make_results
from tests.demo.tiny import tiny_task
from tests.training.histories import probe, start


def trained(name: str, surrogate: bool, pick: int) -> TrainedExpert:
    probes = [
        probe(step, 0.5 + step / 100, surrogate=surrogate, task_arithmetic=0.4 - step / 100, ties=0.0)
        for step in (1, 2, 4)
    ]
    history = History([start("task_arithmetic", "ties"), *probes])
    steps = {"task_arithmetic": pick, "ties": pick}
    return TrainedExpert(tiny_task(name, 0), Path("end"), {}, steps, None, history)


EXPERTS = [trained("law", True, 1), trained("code", False, 2)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        seen.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def test_files(tmp_path: Path) -> None:
    paths = draw(EXPERTS, make_results(), "task_arithmetic", tmp_path)
    assert paths == [tmp_path / "composability.png", tmp_path / "composability.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text()


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = draw(EXPERTS, make_results(), "task_arithmetic", tmp_path / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1]


def test_the_curves_above(tmp_path: Path, figures: list[Figure]) -> None:
    draw(EXPERTS, make_results(), "task_arithmetic", tmp_path)
    top, _ = figures[0].subfigs
    assert [axes.get_title() for axes in top.axes] == ["law", "code"]
    for axes, label, pick in zip(top.axes, ("merged with surrogates", "merged"), (1, 2), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_allclose(lines["expert"].get_ydata(), [0.51, 0.52, 0.54])
        np.testing.assert_allclose(lines[label].get_ydata(), [0.39, 0.38, 0.36])
        assert list(lines["pick"].get_xdata()) == [pick]
    [legend] = top.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["expert", "merged with surrogates", "base", "pick", "merged"]


@pytest.mark.parametrize("joint", [False, True])
def test_the_accuracies_below(joint: bool, tmp_path: Path, figures: list[Figure]) -> None:
    scores = {"law": estimate(0.6875), "code": estimate(0.75, None)}
    results = make_results(joint=scores) if joint else make_results()
    draw(EXPERTS, results, "task_arithmetic", tmp_path)
    [axes] = figures[0].subfigs[1].axes
    found = {container.get_label(): container for container in axes.containers}
    wanted = {
        "base": [0.125, 0.25, 0.1875],
        "merged from ends": [0.5, 0.625, 0.5625],
        "merged from picks": [0.5625, 0.6875, 0.625],
        "each expert at its end": [0.75, 0.875, 0.8125],
    } | ({"trained jointly": [0.6875, 0.75, 0.71875]} if joint else {})
    assert set(found) == set(wanted)
    for label, heights in wanted.items():
        line, _, (bars,) = found[label]
        assert list(line.get_ydata()) == heights
        lengths = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
        spread = [0.1, 0.0 if label == "trained jointly" else 0.1, 0.0]
        np.testing.assert_allclose(lengths, spread, atol=1e-12)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["law", "code", "mean"]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {f"{heights[-1]:.3f}" for heights in wanted.values()}


def test_the_method_that_was_chosen(tmp_path: Path, figures: list[Figure]) -> None:
    draw(EXPERTS, make_results(), "ties", tmp_path)
    [axes] = figures[0].subfigs[1].axes
    found = {container.get_label(): container for container in axes.containers}
    assert list(found["merged from ends"][0].get_ydata()) == [0.375, 0.375, 0.375]
    assert "(ties, validation)" in figures[0].subfigs[0].get_suptitle()
