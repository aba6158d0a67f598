from __future__ import annotations

import numpy as np
import pytest

from benchmarks.method_order import TEXT_SUITE, mean_and_interval, table


def cell(share: float, scale: float = 1.0, inside: bool = True) -> dict[str, object]:
    right = [int(i < 100 * share) for i in range(100)]
    return {"scale": scale, "inside": inside, "accuracy": dict.fromkeys(TEXT_SUITE, right)}


def test_means_count_tasks_alike_and_intervals_are_those_of_the_binomial() -> None:
    small, large = [1, 0] * 10, [1] * 400
    mean, low, high = mean_and_interval([[small, large]])
    assert mean == pytest.approx(0.75)
    spread = np.sqrt(0.25 / 20) / 2
    assert low == pytest.approx(0.75 - 1.96 * spread, abs=0.02)
    assert high == pytest.approx(0.75 + 1.96 * spread, abs=0.02)


def test_the_table_is_in_order_and_marks_edges() -> None:
    references = {
        kind: {task: [value] for task in TEXT_SUITE} for kind, value in (("base", 0), ("expert", 1))
    }
    cells = {
        "references/8/0": references,
        "good/8/0": cell(0.8, 1.28),
        "poor/8/0": cell(0.3, 4.0, inside=False),
    }
    lines = table(cells).split("Published")[0].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| merged with",
        "| *base*",
        "| *expert*",
        "| poor",
        "| good",
    ]
    assert "0.300" in rows[3]
    assert "4 >" in rows[3]
    assert ">" not in rows[4]


def test_published_orderings_are_judged_on_the_same_examples() -> None:
    references = {
        kind: {task: [value] for task in TEXT_SUITE} for kind, value in (("base", 0), ("expert", 1))
    }
    cells = {
        "references/8/0": references,
        "average/8/0": cell(0.3),
        "task_arithmetic/8/0": cell(0.5),
        "ties/8/0": cell(0.2),
        "consensus/8/0": cell(0.5),
    }
    found = {row.split(" | ")[0]: row for row in table(cells).splitlines() if " < " in row}
    assert "+0.200" in found["| average < task_arithmetic"]
    assert found["| average < task_arithmetic"].endswith("| yes |")
    assert found["| task_arithmetic < ties"].endswith("| no |")
    assert found["| task_arithmetic < consensus"].endswith("| open |")
    assert "not measured" in found["| ties < pcb"]
