from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mergeready.study.cells import Cell
from mergeready.study.results import Results, Sample
from mergeready.study.table import rows
from mergeready.study.tables import tables


def cell(
    method: str, at: str, seed: int, test: list[int], validation: float, arm: str = "plain"
) -> tuple[Cell, dict]:
    steps = {"a": 1}
    tasks = {"a": {"test": test, "validation": validation, "extra": {}}}
    content = {"tasks": tasks, "base": {"a": {"test": [0, 0, 0, 1]}}, "steps": steps, "metric": "accuracy"}
    extra = {} if method == "expert" else {"scale": 0.5, "inside": at != "8", "cpu_seconds": 1800.0}
    return Cell(arm, seed, at, method, 2), content | extra


@pytest.fixture
def results() -> Results:
    made = []
    for seed in (0, 1, 2):
        for at, experts, merged, validation in (
            ("2", [1, 1, 0, 0], [1, 1, 1, 0], 0.9),
            ("8", [1, 1, 1, 1], [1, 0, 0, 0], 0.4),
        ):
            made.append(cell("expert", at, seed, experts, 1 - validation))
            made.append(cell("ties", at, seed, merged if seed else [1, 1, 0, 0], validation))
    return Results(dict(made))


def test_intervals_over_seeds_are_students() -> None:
    for count in (2, 3, 7, 11, 12, 13, 30, 200):
        means = np.linspace(0.1, 0.9, count) ** 2
        estimate = Sample({"a": means[:, None]}).over_seeds()
        low, high = stats.t.interval(0.95, count - 1, means.mean(), stats.sem(means))
        assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-9)


def test_intervals_over_examples_are_the_binomials_and_pairing_narrows_them() -> None:
    rng = np.random.default_rng(1)
    one = (rng.random(400) < 0.7).astype(float)[None]
    two = one.copy()
    two[0, :20] = 0
    alone = Sample({"a": one}).over_examples()
    assert alone.low is not None
    assert alone.low == pytest.approx(
        one.mean() - 1.96 * np.sqrt(one.mean() * (1 - one.mean()) / 400), abs=0.006
    )
    paired = Sample({"a": one}).minus(Sample({"a": two})).over_examples()
    assert paired.high is not None
    assert paired.low is not None
    assert paired.high - paired.low < 0.05


def test_tasks_count_alike_however_many_examples_they_have() -> None:
    assert Sample({"a": np.ones((1, 9)), "b": np.zeros((1, 1))}).value == 0.5


def test_the_best_step_is_chosen_on_validation_and_reported_on_test(results: Results) -> None:
    assert results.best_step("plain", "ties") == 2
    assert results.best_step("plain", "expert") == 8
    difference = results.difference(("plain", 8, "ties"), ("plain", 2, "ties"))
    assert difference is not None
    assert list(difference.by_seed) == [0.0, -0.5, -0.5]


def test_tables_say_what_the_cells_say(results: Results) -> None:
    text = tables(results, "made up")
    assert "| *base* | 0.250 [0.250, 0.250] | 0.250 [0.250, 0.250] |" in text
    assert "| *experts* | 0.500 [0.500, 0.500] | 1.000 [1.000, 1.000] |" in text
    assert "(×0.5) |" in text
    assert "(×0.5>) |" in text
    mean, half = -1 / 3, 4.303 * np.std([0, -0.5, -0.5], ddof=1) / np.sqrt(3)
    assert f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]" in text
    assert "took 3.00 CPU hours" in text
    assert f"Means of {results.metric} over" in text


def test_losses_are_best_where_they_are_small(results: Results) -> None:
    contents = {key: {**content, "metric": "eval_loss"} for key, content in results.contents.items()}
    assert Results(contents).best_step("plain", "ties") == 8


def test_rows_hold_every_task_of_every_cell(results: Results) -> None:
    made = list(rows(results.contents))
    assert len(made) == 12
    assert made[0]["base_test"] == 0.25
    assert made[1]["scale_inside"] is True


def test_an_empty_study_says_so() -> None:
    assert "Nothing was computed yet" in tables(Results({}), "none")
