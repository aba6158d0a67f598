"""The scripts of examples/: each runs, and prints what examples/README.md says it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = "languages.py"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != SHARED)

RUNNER = """
import contextlib, io, json, runpy, sys, traceback
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
outcomes = {}
for name in names:
    sys.argv = [name] if name == "validate_in_ci.py" else [name, "--quick"]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(f"{folder}/{name}", run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:
            code = traceback.format_exc()
    outcomes[name] = [code, printed.getvalue()]
with open("outcomes.json", "w", encoding="utf-8") as file:
    json.dump(outcomes, file)
"""
"""One process for all: most of a quick run is importing. A process of its own, as scripts change global settings."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    for library in ("trl", "peft", "lightning", "accelerate", "datasets"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("examples")
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(EXAMPLES), *SCRIPTS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[object]] = json.loads((folder / "outcomes.json").read_text("utf-8"))
    return found


def printed_by(outcomes: dict[str, list[object]], name: str) -> str:
    code, printed = outcomes[name]
    assert code == 0, f"{name}: {code}"
    return str(printed)


def probes(text: str, methods: int = 1) -> list[list[float]]:
    """Rows of the table of probes: step, expert, and merged value and scale of each method."""
    lines = [line.replace(">", " ").split() for line in text.splitlines()]
    rows = [line for line in lines if len(line) == 2 + 2 * methods and line[0].isdigit()]
    return [[float(value) for value in row] for row in rows]


def assert_table(text: str, last: int, methods: int = 1) -> None:
    rows = probes(text, methods)
    assert re.search(r"^step +expert", text, re.MULTILINE)
    assert rows[0][0] == 1
    assert rows[-1][0] == last
    assert all(0 <= value <= 1 for row in rows for value in (row[1], *row[2::2]))
    assert max(row[1] for row in rows) > rows[0][1], "the expert learned nothing"


def test_readme_lists_every_script_once() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8"), re.M)
    assert all(text == target for text, target in listed)
    assert sorted(text for text, _ in listed) == SCRIPTS


def test_scripts_take_nothing_from_tests() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text("utf-8"), re.M), path.name


@pytest.mark.slow
def test_trainer(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "trainer.py")
    rows = probes(text, methods=2)
    assert rows[0][0] == 1
    assert rows[-1][0] >= 20
    stopped = re.search(r"stopped at step (\d+): merged metric", text)
    assert int(stopped[1]) == rows[-1][0] if stopped else rows[-1][0] == 40
    kept = dict(re.findall(r"kept (\S+): step (\d+)", text))
    assert {"expert-best", "merge-best:task_arithmetic", "merge-best:ties"} <= set(kept)
    for column, name in ((1, "expert-best"), (2, "merge-best:task_arithmetic"), (4, "merge-best:ties")):
        assert {int(row[0]): row[column] for row in rows}[int(kept[name])] == max(row[column] for row in rows)


@pytest.mark.slow
def test_trainer_lora(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "trainer_lora.py")
    assert_table(text, last=40)
    assert re.search(r"the adapter moves the weights by [1-9]\d*\.\d\d, \d+% of the base's norm", text)


@pytest.mark.slow
def test_lightning_module(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "lightning_module.py")
    assert_table(text, last=40)
    best = re.search(r"best mergeready/merged/task_arithmetic: (\S+)", text)
    assert best
    assert float(best[1]) == max(row[2] for row in probes(text) if row[0] % 10 == 0)  # when it may save


@pytest.mark.slow
def test_accelerate_loop(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "accelerate_loop.py")
    assert_table(text, last=40)
    assert re.search(
        r"40 optimizer steps; early stopping would have ended the run at step (\[\d+\]|none)", text
    )


@pytest.mark.slow
def test_plain_pytorch(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "plain_pytorch.py")
    without, governed = text.split("ungoverned: ")
    assert_table(without, last=40)
    assert_table(governed, last=40)
    ratios = [float(ratio) for ratio in re.findall(r"ratio (\S+)", text)]
    assert ratios[0] > 1.5
    assert ratios[1] <= 1.1


@pytest.mark.slow
def test_trl_sft(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "trl_sft.py")
    rows = probes(text)
    assert [row[0] for row in rows][-1] == 24
    assert rows[-1][1] < rows[0][1], "the expert learned nothing"
    assert all(row[2] > 0 and row[3] > 0 for row in rows)


@pytest.mark.slow
def test_merge_and_tune(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "merge_and_tune.py")
    rows = {
        match[1].strip(): match[2].split()
        for match in re.finditer(r"^(\w+(?: \w+)?) +([\d. ]+)$", text, re.M)
    }
    assert set(rows) == {"base", "expert north", "expert south", "average", "task_arithmetic", "ties"}
    north, south = ([float(v) for v in rows[f"expert {task}"]] for task in ("north", "south"))
    base = [float(value) for value in rows["base"]]
    assert north[0] > base[0]
    assert south[1] > base[1]
    for method in ("average", "task_arithmetic", "ties"):
        scale, *values = (float(value) for value in rows[method])
        assert scale > 0
        assert sum(values) > sum(base)


@pytest.mark.slow
def test_validate_in_ci(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "validate_in_ci.py")
    broken, healthy = text.split("\nexample-runs/north\n")
    assert "F003 failed (error): NaN or infinite values in classifier.weight" in broken
    assert "fix: " in broken
    assert "exit code 1" in broken
    assert "exit code 0" in healthy
    assert "(error)" not in healthy
    assert "Merge-ready: every level was checked." in healthy


@pytest.mark.slow
def test_exchange_fingerprints(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "exchange_fingerprints.py")
    rows = re.findall(r"^ +(\d+) +(\S+) +(\S+) ± (\S+) +(\S+) ± (\S+)$", text, re.M)
    assert [int(row[0]) for row in rows][-1] == 40
    exact = re.search(r"exact, from both weights: (\S+), (\S+)", text)
    assert exact
    for value, error, truth in ((rows[-1][2], rows[-1][3], exact[1]), (rows[-1][4], rows[-1][5], exact[2])):
        assert 0 < float(error) < 0.1
        assert abs(float(value) - float(truth)) < 4 * float(error)


@pytest.mark.slow
def test_study_own_data(outcomes: dict[str, list[object]]) -> None:
    text = printed_by(outcomes, "study_own_data.py")
    assert "6 cells computed, 2 training runs" in text
    for name in (r"\*base\*", r"\*experts\*", "task_arithmetic", "ties"):
        assert re.search(rf"^\| {name} \| \d\.\d+ \[\d\.\d+, \d\.\d+\]", text, re.M), name
