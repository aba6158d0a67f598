from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mergeready import Monitor, Peer, Picks, Probe, Schedule
from mergeready.experts import Base, open_expert
from mergeready.experts.fingerprint import open_fingerprint
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.finish import FinishedRun
from mergeready.training.history import History
from mergeready.training.save import save_expert
from mergeready.transformers import MergeReadyCallback
from mergeready.validation.check import Verdict
from mergeready.validation.report import Report
from mergeready.validation.share import share_run, with_sharing
from tests.hub import serving
from tests.models import perturb, tiny_bert
from tests.trainers import make_trainer, right_or_wrong
from tests.training import small
from tests.validation.experts import write_base, write_full

SHARED = {"README.md", "mergeready-report.html", "mergeready-report.json"}


def run(folder: Path, **options: Any) -> Monitor:
    """A small run, whose base is what it started from."""
    probe = Probe(merge="ties", evaluate=small.Evaluation(0), schedule=Schedule(every=5))
    monitor = Monitor(probe=probe, measure=Schedule(every=5), picks=Picks(), **options)
    model = small.Net()
    monitor.start(model, folder, total_steps=10, save=lambda place: save_expert(model, place))
    small.train(model, 0, 10, monitor.on_step)
    return monitor


def test_each_pick_gets_what_is_shared(tmp_path: Path) -> None:
    peer = small.Net()
    small.train(peer, 1, 5)
    monitor = run(tmp_path / "law" / "mergeready", peers=[Peer(peer, name="/home/me/peer")], share=share_run)
    summary = monitor.finish()
    for step in set(summary["picks"].values()):
        folder = tmp_path / "law" / "mergeready" / "picks" / f"step-{step:06}"
        name = f"law-step-{step:06}"
        assert {path.name for path in folder.iterdir()} >= {*SHARED, f"{name}.fingerprint.safetensors"}
        made = open_fingerprint(folder / f"{name}.fingerprint.safetensors", monitor.live.base)
        assert made.label == name
        report = json.loads((folder / "mergeready-report.json").read_text())
        assert report["expert"] == name
        found = {v["id"]: v["status"] for v in report["verdicts"]}
        assert (found["B102"], found["D200"], found["C401"]) == ("passed", "passed", "passed")
        assert found["C402"] == "not checked"
        page = (folder / "mergeready-report.html").read_text()
        assert page.count("<svg") == 4  # curve, retention, growth, interference
        for path in folder.iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_files_are_the_same_again(tmp_path: Path) -> None:
    monitor = run(tmp_path / "law", share=share_run)
    monitor.finish()
    monitor.finish()  # the card is looked at as well, and is there only now
    picks = tmp_path / "law" / "picks"
    # The safetensors library writes its metadata in any order.
    texts = [path for path in picks.rglob("*.*") if path.suffix in (".html", ".json", ".md")]
    before = {path: path.read_bytes() for path in texts}
    monitor.finish()
    assert {path: path.read_bytes() for path in texts} == before


def test_without_it_picks_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "law").finish()
    assert not list((tmp_path / "law").rglob("*report*"))


def test_what_cannot_be_validated_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_base(tmp_path / "base")
    good = write_full(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    picks = {"a": tmp_path / "empty", "b": good, "c": good}
    caplog.set_level(logging.WARNING, "mergeready")
    share_run(FinishedRun(tmp_path, picks, Base.open(tmp_path / "base"), [], History()))
    assert "no report on the picked" in caplog.text
    assert "empty" in caplog.text
    assert {path.name for path in good.iterdir()} >= SHARED


def test_numbers_that_json_cannot_hold() -> None:
    verdict = Verdict(
        id="X1", level="file", severity="info", title="x", status="failed", message="y", value=math.nan
    )
    found = Report(expert="law", level="file", verdicts=[verdict], facts={"a": (1.0, math.inf)}).to_json()
    assert found["verdicts"][0]["value"] is None
    assert found["facts"] == {"a": [1.0, None]}


@pytest.mark.parametrize("sketched", [False, True])
def test_live_peers_are_called_as_the_run_calls_them(tmp_path: Path, sketched: bool) -> None:
    base = Base.open(write_base(tmp_path / "base"))
    law = write_full(tmp_path / "law")
    other: Any = perturb(tiny_bert(), 5)
    if sketched:
        other = take_fingerprint(open_expert(other, base).vector, base)
    peers = [Peer(other, name="/home/me/code"), other]
    share_run(FinishedRun(tmp_path / "run", {"last": law}, base, peers, History()))
    report = json.loads((law / "mergeready-report.json").read_text())
    assert report["pairs"]["labels"][:2] == ["run-law", "code"]
    assert "BertForSequenceClassification" in report["pairs"]["labels"][2]
    assert "code: cosine" in next(v["message"] for v in report["verdicts"] if v["id"] == "C401")


def test_shells_share_unless_told_otherwise(sharing: None) -> None:
    assert with_sharing({})["share"] is share_run
    assert with_sharing({"share": None})["share"] is None


def test_the_trainer_takes_it_along(sharing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    probe = Probe(merge="ties", evaluate=right_or_wrong(), schedule=Schedule(every=6))
    trainer = make_trainer(tmp_path / "law", MergeReadyCallback(probe=probe, picks=Picks(merge_best=False)))
    trainer.train()
    with serving(monkeypatch) as hub:
        trainer.push_to_hub(token="hf_" + "x" * 34)
    [pick] = {path.split("/")[2] for path in hub.files if path.startswith("mergeready/picks/step")}
    folder = tmp_path / "law" / "mergeready" / "picks" / pick
    for name in (*SHARED, f"law-{pick}.fingerprint.safetensors", "model.safetensors"):
        assert hub.files[f"mergeready/picks/{pick}/{name}"] == (folder / name).read_bytes()
    assert "## Composability" in hub.files[f"mergeready/picks/{pick}/README.md"].decode()
