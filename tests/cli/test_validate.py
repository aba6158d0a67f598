from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from mergeready.validation import Evaluation
from tests.cli.commands import run
from tests.hub import serving
from tests.models import tiny_bert
from tests.validation.experts import write_base, write_full


@pytest.fixture
def law(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return write_full(tmp_path / "law")


def test_a_healthy_expert(law: Path, tmp_path: Path) -> None:
    done = run("validate", law, "--base", tmp_path / "base", "-o", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert "1 failed (1 info)" in done.stdout
    assert f"Wrote {tmp_path / 'report.json'}" in done.stdout
    assert "Not a verdict on merging" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1


def test_exit_codes(law: Path, tmp_path: Path) -> None:
    (law / "README.md").unlink()
    assert run("validate", law, "--base", tmp_path / "base").exit_code == 0
    assert run("validate", law, "--base", tmp_path / "base", "--fail-on", "warning").exit_code == 1
    assert run("validate", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize(
    "broken",
    [
        ["--base", "nowhere"],
        ["--base", "base", "--peers", "nowhere"],
        ["--base", "base", "--eval", "tests.cli.test_validate:an_evaluation_that_raises"],
    ],
)
def test_what_is_named_and_does_not_work_is_no_success(
    law: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("validate", "law", *broken)
    assert done.exit_code == 2, done.output
    assert "could not run: see" in done.stdout
    assert run("validate", "law", *broken, "--fail-on", "info").exit_code == 1  # it has no record


def an_evaluation_that_raises(base: object) -> Evaluation:
    def own(model: object) -> dict[str, float]:
        raise RuntimeError("no data here")

    return Evaluation(model=tiny_bert(), own=own)


def test_a_crash_is_no_verdict(law: Path, tmp_path: Path) -> None:
    target = "tests.cli.test_validate:no_evaluation_at_all"
    done = run("validate", law, "--base", tmp_path / "base", "--eval", target)
    assert done.exit_code == 2
    assert "KeyError: 'no such file'" in done.stderr


def no_evaluation_at_all(base: object) -> Evaluation:
    raise KeyError("no such file")


def test_fixes_are_shown(law: Path, tmp_path: Path) -> None:
    done = run("validate", law, "--base", law)
    assert done.exit_code == 1
    assert "every parameter equals the base's" in " ".join(done.stdout.split())
    assert "fix:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "report.pdf"], "report.pdf must end with .html or .json"),
        (["--history", "history.jsonl", "-o", "report.json"], "--history draws curves on a page"),
        (["--private"], "--private is about the repository of --push"),
        (["--card"], "org/law is none"),
        (["--peers", "org/code"], "--base is missing"),
        (["--eval", "my_task:evaluation"], "an evaluation lacks --base"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_anything_is_checked(
    arguments: list[str], message: str
) -> None:
    done = run("validate", "org/law", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_report_that_cannot_be_written_is_shown_all_the_same(law: Path, tmp_path: Path) -> None:
    done = run("validate", law, "--base", tmp_path / "base", "-o", tmp_path / "nowhere" / "report.json")
    assert done.exit_code == 2
    assert "could not run" in done.stderr
    assert "Not a verdict on merging" in done.stdout


def test_push(law: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 6)
    with serving(monkeypatch) as hub:
        done = run("validate", law, "--base", tmp_path / "base", "--push", "me/law")
        assert done.exit_code == 0, done.output
        assert "Uploaded to http://127.0.0.1" in done.stdout
        assert "README.md" in hub.files
        assert any(token.endswith("s3cret") for token in hub.tokens)
        hub.refuse = 500
        failed = run("validate", law, "--base", tmp_path / "base", "--push", "me/law")
    assert failed.exit_code == 2
    assert "s3cret" not in done.output + failed.output
