"""Broken files are refused with an error that says so, or read; nothing else may come out of a reader."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.fuzz import campaign
from tests.fuzz.campaign import Outcomes, attack
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, make_targets

INPUTS = 60
NAMES = (
    "safetensors", "config", "index", "adapter weights", "adapter config", "fingerprint", "history", "merge recipe",
    "model card",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in make_targets(tmp_path_factory.mktemp("fuzz"))}


def test_all_readers_are_named(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_readers_answer_or_refuse(targets: dict[str, Target], name: str) -> None:
    target, outcomes = targets[name], Outcomes()
    target.read()  # the healthy file can be read
    for seed in range(INPUTS):
        attack(target, seed, outcomes)
    assert outcomes.findings == {}
    assert outcomes.refused > 0, "no input was broken enough to be refused"


def test_findings_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"a": [1, 2, 3]}')
    outcomes = Outcomes()
    for seed in range(20):
        attack(Target("naive", file, lambda: json.loads(file.read_text())["a"][2]), seed, outcomes)
    assert outcomes.findings
    assert file.read_text() == '{"a": [1, 2, 3]}'


def test_slowness_is_a_reader_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is slow where it computes for long, and not where the machine stalls."""
    monkeypatch.setattr(campaign, "SLOW_SECONDS", 0.1)
    file = tmp_path / "file"
    file.write_text("text")

    def compute() -> None:
        began = time.process_time()
        while time.process_time() - began < 0.11:
            pass

    for read, findings in ((lambda: time.sleep(0.2), {}), (compute, {"slow": "seed 0"})):
        outcomes = Outcomes()
        attack(Target("slow", file, read), 0, outcomes)
        assert outcomes.findings == findings


def test_mutations_depend_on_their_seed_alone() -> None:
    content = b'{"a": 1, "b": [2, {"c": "x"}]}'
    assert all(mutate(content, random.Random(s)) == mutate(content, random.Random(s)) for s in range(50))
    assert len({mutate(content, random.Random(s)) for s in range(50)}) > 30
