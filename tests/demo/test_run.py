from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mergeready.demo import run as run_module
from mergeready.demo.encoder import encoder_folder
from mergeready.demo.results import DemoResults
from mergeready.demo.run import run_demo
from mergeready.demo.settings import DemoSettings
from mergeready.errors import FormatError, OutputExistsError
from mergeready.experts import open_expert, squared_norms
from mergeready.training.history import read_history
from tests.demo.tiny import Listening, tiny_base, tiny_task

SETTINGS = DemoSettings(
    steps=4, batch_size=8, learning_rate=3e-3, probe_first=1, probe_every=2, patience=1, joint=True
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A demo whose encoder and tasks are tiny."""
    base = tiny_base(tmp_path / "base")
    monkeypatch.setattr(run_module, "encoder_folder", lambda: base)
    tasks = [tiny_task("law", 0), tiny_task("code", 1), tiny_task("verse", 2)]
    monkeypatch.setattr(run_module, "load_tasks", lambda: tasks)
    return base


def check_folder(folder: Path, base: Path, names: list[str], settings: DemoSettings) -> None:
    """Everything that a finished demo leaves."""
    content = json.loads((folder / "results.json").read_text())
    results, noted = content["results"], content["settings"]
    assert (noted["steps"], noted["seed"], noted["methods"]) == (
        settings.steps,
        settings.seed,
        list(settings.methods),
    )
    assert set(results) == set(DemoResults.__dataclass_fields__)
    for part in ("base", "experts", "stopped_at"):
        assert list(results[part]) == names
    for part in ("ends", "picks", "gain", "pick_steps"):
        assert list(results[part]) == list(settings.methods)
    for method in settings.methods:
        assert list(results["ends"][method]["tasks"]) == names
        assert list(results["pick_steps"][method]) == names
    estimates = [*results["base"].values(), *results["experts"].values()]
    assert all(e["low"] <= e["value"] <= e["high"] for e in estimates)
    assert (results["joint"] is None) == (not settings.joint)
    assert results["seconds"] > 0
    assert {path.name for path in folder.iterdir()} == {
        *names,
        *(["joint"] if settings.joint else []),
        "results.json",
        "composability.png",
        "composability.svg",
    }
    for index, name in enumerate(names):
        history = read_history(folder / name / "mergeready" / "history.jsonl")
        assert history.probes[-1].step == settings.steps
        assert history.start is not None
        peers = [folder / other / "mergeready" / "picks" for other in names[:index]]
        steps = [results["pick_steps"][settings.methods[0]][other] for other in names[:index]]
        for other, place, step in zip(names, peers, steps, strict=False):
            pick = open_expert(place / f"step-{step:06}", base, strict=False)
            assert history.start.peers[other] == sum(squared_norms(pick.vector).values()) ** 0.5
        assert set(history.start.peers) == set(names[:index])
        picks = folder / name / "mergeready" / "picks"
        index_of_picks = json.loads((picks / "picks.json").read_text())
        assert {"expert-best", *(f"merge-best:{method}" for method in settings.methods)} == set(
            index_of_picks
        )
        for method in settings.methods:
            pick = index_of_picks[f"merge-best:{method}"]
            assert pick["step"] == results["pick_steps"][method][name]
        for pick in index_of_picks.values():
            assert open_expert(picks / pick["folder"], base, strict=False).base_checked == "recorded"
        assert open_expert(folder / name / "end", base, strict=False).extra == ()


def test_a_small_demo(small: Path, tmp_path: Path) -> None:
    listening = Listening()
    results, pictures = run_demo(tmp_path / "demo", SETTINGS, listening)
    check_folder(tmp_path / "demo", small, ["law", "code", "verse"], SETTINGS)
    content = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert content["results"] == json.loads(json.dumps(results.to_json()))
    assert all(path.is_file() for path in pictures)
    assert [event for event in listening.events if event[0] in ("started", "working on")] == [
        ("started", "law", 4, ()),
        ("started", "code", 4, ("law",)),
        ("started", "verse", 4, ("law", "code")),
        ("working on", "one model on all tasks"),
        ("working on", "merging ends and picks"),
    ]


def test_the_seed_decides(small: Path, tmp_path: Path) -> None:
    settings = DemoSettings(steps=2, batch_size=8, learning_rate=3e-3, probe_first=2, seed=5)
    texts = []
    for name in ("a", "b"):
        run_demo(tmp_path / name, settings, Listening())
        content = json.loads((tmp_path / name / "results.json").read_text())
        assert content["results"].pop("seconds") > 0
        texts.append(json.dumps(content))
        texts.append((tmp_path / name / "law" / "mergeready" / "history.jsonl").read_text())
    assert texts[:2] == texts[2:]


def test_an_existing_folder_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "encoder_folder", lambda: pytest.fail("nothing must start"))
    (tmp_path / "demo").mkdir()
    with pytest.raises(OutputExistsError, match=r"exists\. Name another output folder, or delete it"):
        run_demo(tmp_path / "demo", SETTINGS, Listening())
    assert list((tmp_path / "demo").iterdir()) == []


def test_without_the_encoder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FormatError("the demo's encoder is not installed")

    monkeypatch.setattr(run_module, "encoder_folder", missing)
    with pytest.raises(FormatError, match="not installed"):
        run_demo(tmp_path / "demo", SETTINGS, Listening())
    assert not (tmp_path / "demo").exists()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    start = "import torch; torch.set_num_threads(1); from mergeready.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments], check=False, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_command_on_real_weights_and_texts(tmp_path: Path) -> None:
    """``mergeready demo --quick``, from the outside; and a second run on the same folder is refused."""
    folder = tmp_path / "demo"
    done = command("demo", "--quick", "-o", str(folder))
    assert done.returncode == 0, done.stderr
    names = ["wordnet_noun", "wordnet_topic", "emoji_name", "udhr"]
    check_folder(folder, encoder_folder(), names, DemoSettings.quick())
    for words in (*names, "Test accuracy", "from picks", "task_arithmetic: ends ", "ties: ends ", "Took "):
        assert words in done.stdout
    again = command("demo", "--quick", "-o", str(folder))
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "exists" in again.stderr
    assert again.stderr.count("\n") == 1
    shutil.rmtree(folder)  # a gigabyte, which pytest would keep
