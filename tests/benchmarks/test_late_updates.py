"""What the study says of late updates and of metrics, on experts whose figures are known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import late_updates, late_updates_page, prediction_page, tsv_parts
from benchmarks.late_updates import MATRICES
from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense
from mergeready.experts.task_vector import TaskVector
from mergeready.metrics.prediction import how_well_predicts
from mergeready.study.cells import EXPERT, Cell
from mergeready.study.results import Results
from mergeready.weights import StateDictSource

SIDE = 16
STEPS, SEEDS, TASKS = (8, 64, 256), (0, 1, 2), tuple(f"task {i}" for i in range(8))


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor([*values, *[0.0] * (SIDE - len(values))]))


def expert(matrix: torch.Tensor) -> TaskVector:
    base = StateDictSource({name: torch.ones(SIDE, SIDE) for name in MATRICES})
    return DeltaTaskVector(
        {name: Dense(matrix) for name in MATRICES}, base.infos, BaseIdentity.of(base), "made"
    )


def test_spectra_are_those_of_diagonal_matrices() -> None:
    early = diagonal(*range(10, 0, -1))
    late = diagonal(0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4)
    found = late_updates.spectra(*map(expert, (early + late, early, late)), experts=4)
    assert found["late_inside_left"] == pytest.approx(9 / 25)
    assert found["late_inside_right"] == pytest.approx(9 / 25)
    assert found["chance_left"] == found["chance_right"] == 0.5
    # 16 over 4 experts are 4 directions; those of the end are the coordinates with 10, 9, 8 and 7.
    assert found["late_kept"] == pytest.approx(0, abs=1e-12)
    assert found["early_kept"] == pytest.approx(294 / 385)
    assert found["end_kept"] == pytest.approx(294 / (385 - 9 + 36 + 16))
    assert found["early_stable_rank"] == pytest.approx(3.85)
    assert found["late_stable_rank"] == pytest.approx(25 / 16)
    assert found["late_top_1"] == pytest.approx(16 / 25)


def test_steps_and_late_parts_of_two_experts() -> None:
    one, two = expert(diagonal(3.0)), expert(diagonal(0.0, 4.0))
    grown = [expert(diagonal(3.0, 0.0, 3.0)), expert(diagonal(0.0, 4.0, 4.0))]
    base = StateDictSource({name: torch.ones(SIDE, SIDE) for name in MATRICES})
    found = late_updates.measure_step([one, two], base, 20, (10, [0.0, 0.0]))
    root = len(MATRICES) ** 0.5
    assert found["norm"] == pytest.approx([3 * root, 4 * root])
    assert found["growth"] == pytest.approx([0.3 * root, 0.4 * root])
    assert found["cosine"] == [0, 0]
    assert (found["interference"], found["times_over"]) == (0, pytest.approx(1))
    late = late_updates.measure_late(grown, [one, two], base)
    assert late["norm_to_early"] == pytest.approx([1, 1])
    assert late["cosine_with_early"] == pytest.approx([0, 0])
    assert late["cosine"] == {
        "late": pytest.approx([1, 1]),
        "early": [0, 0],
        "late_with_early_of_peers": [0, 0],
    }
    assert late["times_over"] == pytest.approx((7 * 3 + 7 * 4) / 25)
    assert len(late["spectrum"]) == 2


def test_means_over_peers_leave_out_the_expert_itself() -> None:
    assert late_updates.with_peers([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]) == [0.25, 0.5, 0.25]


def test_the_sum_of_cut_experts_is_what_numpy_says() -> None:
    matrices = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = np.zeros((12, 20))
    for matrix in matrices.numpy():
        U, values, V = np.linalg.svd(matrix, full_matrices=False)
        wanted += (U[:, :3] * values[:3]) @ V[:3]
    assert np.abs(tsv_parts.CutSum().merge_changes(list(matrices), 12).numpy() - wanted).max() < 1e-12


def study(merged: dict[tuple[int, int], list[float]], method: str = "ties") -> Results:
    """Base 0, experts 1; what the merge has of each task, by step and seed."""
    contents: dict[Cell, dict[str, Any]] = {}

    def tasks(values: list[float]) -> dict[str, Any]:
        return {
            task: {"test": [value], "validation": value, "extra": {}}
            for task, value in zip(TASKS, values, strict=True)
        }

    for (step, seed), values in merged.items():
        for label, own in ((EXPERT, [1.0] * 8), (method, values)):
            contents[Cell("plain", seed, str(step), label, 8)] = {"metric": "accuracy", "tasks": tasks(own)}
        contents[Cell("plain", seed, str(step), EXPERT, 8)]["base"] = tasks([0.0] * 8)
    return Results(contents)


def measured(metric: dict[tuple[int, int], list[float]]) -> dict[int, dict[str, Any]]:
    return {
        seed: {
            "pick": 64,
            "tasks": list(TASKS),
            "steps": {
                str(step): dict.fromkeys(prediction_page.METRICS, metric[step, seed])
                | dict.fromkeys(prediction_page.TOGETHER, sum(metric[step, seed]))
                for step in STEPS
            },
        }
        for seed in SEEDS
    }


def test_what_all_experts_of_a_step_share_does_not_count_among_them() -> None:
    # Over the steps metric and retention rise together; within each step they are opposite.
    metric = {(step, seed): [step + task / 10 for task in range(8)] for step in STEPS for seed in SEEDS}
    kept = {(step, seed): [step / 300 - task / 100 for task in range(8)] for step in STEPS for seed in SEEDS}
    results, found = study(kept), measured(metric)
    rows = prediction_page.expert_rows(results, found, "ties")
    assert len(rows) == 8 * 9
    within = how_well_predicts(rows, ["norm"], group="task")["norm"]
    assert (within.correlation, within.groups) == (pytest.approx(-1), 8)
    assert prediction_page.excludes_zero(within)
    across = prediction_page.cell_rows(results, found, "ties")
    assert how_well_predicts(across, ["norm"], group="seed")["norm"].correlation == pytest.approx(1)
    text = prediction_page.section(results, found)
    assert "| ‖τ‖ | -1.00 [-1.00, -1.00] |" in text
    assert "8 of these 8 intervals exclude 0" in text


def test_metrics_that_tell_nothing_are_said_to_tell_nothing() -> None:
    rng = np.random.default_rng(3)
    metric = {(step, seed): rng.normal(size=8).tolist() for step in STEPS for seed in SEEDS}
    kept = {(step, seed): rng.uniform(size=8).tolist() for step in STEPS for seed in SEEDS}
    text = prediction_page.section(study(kept), measured(metric))
    assert "0 of these 8 intervals exclude 0" in text
    assert "No metric predicts which expert of a step will keep more." in text


@pytest.mark.parametrize(
    ("cut", "claim"),
    [
        (0.4, "So TSV-M bears long training by making the rest orthogonal."),
        (0.6, "So TSV-M bears long training by leaving out weak directions."),
        (
            0.5,
            "So TSV-M bears long training by leaving out weak directions and by making the rest orthogonal.",
        ),
    ],
)
def test_which_half_bears_long_training_is_told_by_differences_of_changes(cut: float, claim: str) -> None:
    def at(end: float) -> dict[tuple[int, int], list[float]]:
        noise = np.random.default_rng(0).normal(0, 0.001, (3, 8))
        return {(64, s): [0.5] * 8 for s in SEEDS} | {(256, s): (end + noise[s]).tolist() for s in SEEDS}

    whole = {**study(at(0.4), "task_arithmetic").contents, **study(at(0.6), "tsv_m").contents}
    text = tsv_parts.sentence(Results(whole), study(at(cut), tsv_parts.CUT))
    assert text.endswith(claim)
    assert f"leaving out weak directions makes {cut - 0.4:+.3f}" in text.replace("-0.000", "+0.000")


def test_curves_turn_only_between_their_ends() -> None:
    assert prediction_page.turns([1.0, 3.0, 2.0, 0.5], [8, 16, 32, 64]) == [16]
    assert prediction_page.turns([1.0, 2.0, 3.0], [8, 16, 32]) == []


def test_ranks_are_taken_among_rows_that_share_a_key() -> None:
    rows = [{"at": 1, "x": 5.0}, {"at": 1, "x": 7.0}, {"at": 2, "x": 9.0}]
    assert [row["x"] for row in prediction_page.ranked_within(rows, "at", ["x"])] == [0.25, 0.75, 0.5]


def test_peaks_are_those_of_validation_and_the_earliest_of_equals() -> None:
    kept = {(step, seed): [{8: 0.2, 64: 0.5, 256: 0.5}[step]] * 8 for step in STEPS for seed in SEEDS}
    assert prediction_page.peak_steps(study(kept), "ties") == {0: 64, 1: 64, 2: 64}


def test_intervals_are_those_of_a_t_test_over_tasks() -> None:
    values = np.array([[1.0, 2.0, 4.0], [3.0, 2.0, 6.0]])  # means over seeds: 2, 2, 5
    found = late_updates_page.Figure(values)
    assert found.mean == 3
    assert found.half == pytest.approx(4.302652729911275 * 3**0.5 / 3**0.5)
    assert not found.excludes_zero
