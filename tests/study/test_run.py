from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergeready import merge
from mergeready.errors import OptionError
from mergeready.study import run as run_module
from mergeready.study.cells import run_digest
from mergeready.study.report import write_report
from mergeready.study.run import Runner
from mergeready.study.settings import load_study
from tests.study import toy


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): without_times(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors"
    }


def without_times(path: Path) -> bytes:
    content = path.read_bytes()
    return re.sub(rb'"cpu_seconds":[\d.e-]+', b"", content) if path.suffix == ".json" else content


@pytest.fixture
def done(study_file: Path, tmp_path: Path) -> Runner:
    runner = Runner(load_study(study_file), tmp_path / "done")
    assert runner.run() == 2 * 2 * 4 * 3  # arms, seeds, moments, expert and two methods
    return runner


def test_one_training_run_serves_all_steps_and_merge_methods(done: Runner) -> None:
    assert done.trained == 2 * 2 * 3  # arms, seeds, tasks
    assert done.run() == 0
    assert done.trained == 12


def test_a_killed_study_goes_on_and_ends_with_the_same_files(
    done: Runner, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, computed = tmp_path / "killed", run_module.train_run
    calls = 0

    def killed(*args: object, **options: object) -> dict[str, object]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return computed(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        Runner(load_study(study_file), folder).run()
    partly = Runner(load_study(study_file), folder)
    assert 0 < len(partly.results()) < 48
    assert partly.run(limit=7) == 7
    resumed = Runner(load_study(study_file), folder)
    resumed.run()
    assert files(folder) == files(done.folder)


def test_a_cell_computed_from_scratch_has_the_same_numbers(done: Runner) -> None:
    for key in ("plain/0/8/task_arithmetic-3", "cosine/1/best_validation/average-3", "plain/1/4/expert-3"):
        assert done.rerun(key).differences == ()


def test_a_changed_number_is_found(done: Runner) -> None:
    path = done.folder / "cells/plain/0/8/task_arithmetic-3.json"
    content = path.read_text()
    assert '"inside":true' in content
    path.write_text(content.replace('"inside":true', '"inside":false'))
    assert done.rerun("plain/0/8/task_arithmetic-3").differences == ("inside was False, now True",)


def test_only_known_and_computed_cells_are_computed_again(done: Runner, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no cell 'plain/0/9.*plain/0/8/expert-3"):
        done.rerun("plain/0/9/average-3")
    with pytest.raises(OptionError, match="not computed yet"):
        Runner(done.settings, tmp_path / "empty").rerun("plain/0/8/average-3")


def test_merged_accuracy_is_that_of_a_merge_made_by_hand(done: Runner) -> None:
    cell = next(c for c in done.results() if c.key == "plain/1/4/task_arithmetic-3")
    content = done.results()[cell]
    states = []
    for task in toy.TASKS:
        digest = run_digest(done.settings, done.settings.arms["plain"], task, 1)
        states.append(load_file(done.folder / "checkpoints" / f"{task}-1-{digest}" / "step-4.safetensors"))
    base = toy.model()
    merged = merge(base, states, scale=content["scale"]).eval()
    suite = toy.suite(1)
    for task in toy.TASKS:
        expected = suite.tasks[task].test(merged)["accuracy"].tolist()
        assert content["tasks"][task]["test"] == expected
        assert len(content["tasks"][task]["extra"]["on training examples"]) == 40
    assert content["scale"] in dict(content["tried"])


def test_best_validation_takes_each_run_where_its_own_validation_is_best(done: Runner) -> None:
    contents = {cell.key: content for cell, content in done.results().items()}
    picked = contents["plain/0/best_validation/average-3"]["steps"]
    for task in toy.TASKS:
        values = {s: contents[f"plain/0/{s}/expert-3"]["tasks"][task]["validation"] for s in (2, 4, 8)}
        assert values[picked[task]] == max(values.values())
        assert all(values[s] < values[picked[task]] for s in values if s < picked[task])


def test_searches_start_where_the_next_later_step_was_best(done: Runner) -> None:
    contents = {cell.key: content for cell, content in done.results().items()}
    assert contents["plain/0/8/task_arithmetic-3"]["first_scales"] == [0.5, 0.8]
    later = contents["plain/0/8/task_arithmetic-3"]
    first = contents["plain/0/4/task_arithmetic-3"]["first_scales"]
    expected = [later["scale"] / 1.6, later["scale"], later["scale"] * 1.6]
    assert first == (expected if later["inside"] and later["scale"] > 0 else [0.5, 0.8])


def test_other_settings_do_not_reuse_results(done: Runner, study_file: Path) -> None:
    study_file.write_text(study_file.read_text().replace("learning_rate: 0.05", "learning_rate: 0.04"))
    assert Runner(load_study(study_file), done.folder).results() == {}
    study_file.write_text(study_file.read_text().replace("learning_rate: 0.04", "learning_rate: 0.05"))
    study_file.write_text(study_file.read_text().replace("average: {tune: false}", "average: {}"))
    left = Runner(load_study(study_file), done.folder).results()
    assert {cell.method for cell in left} == {"expert", "task_arithmetic"}


def test_arms_that_train_alike_share_their_runs(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text().replace("cosine: {schedule: {kind: cosine, warmup_steps: 2}}", "again: {}")
    study_file.write_text(text)
    runner = Runner(load_study(study_file), tmp_path / "shared")
    runner.run()
    assert runner.trained == 2 * 3


def test_tables_and_parquet_are_the_same_bytes_each_time(done: Runner) -> None:
    first = {
        path.name: path.read_bytes() for path in write_report(done) if path.suffix in (".md", ".parquet")
    }
    again = Runner(done.settings, done.folder)
    second = {
        path.name: path.read_bytes() for path in write_report(again) if path.suffix in (".md", ".parquet")
    }
    assert first == second
    assert set(first) == {"results.parquet", "tables.md"}
    assert again.trained == 0


def test_checkpoints_trained_elsewhere_can_be_studied(done: Runner, study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text()
    arms = text[text.index("arms:") : text.index("methods:")]
    pattern = done.folder / "elsewhere" / "{task}-{seed}-*" / "step-{step}.safetensors"
    for path in (done.folder / "checkpoints").iterdir():
        task, seed, _ = path.name.rsplit("-", 2)
        target = done.folder / "elsewhere" / f"{task}-{seed}-x"
        if not target.exists():
            target.mkdir(parents=True)
            for file in path.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
    study_file.write_text(text.replace(arms, f"arms:\n  given: {{checkpoints: '{pattern}'}}\n"))
    runner = Runner(load_study(study_file), tmp_path / "given")
    runner.run()
    assert runner.trained == 0
    assert len(runner.results()) == 2 * 4 * 3
