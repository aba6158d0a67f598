"""Recipes in a job of two processes: they train as one, or say why they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(folder: Path, recipe: str, *changes: str) -> subprocess.CompletedProcess[str]:
    options = [word for change in changes for word in ("--set", change)]
    return subprocess.run(
        [*LAUNCH, "-m", "mergeready.cli", "train", str(ROOT / "recipes" / recipe), "--quick", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "output", "changes"),
    [
        ("text/full.yaml", "text-full", []),
        ("hub/llama_8b_lora_fsdp2.yaml", "llama-8b-lora", ["optimisation.sharding=fsdp2"]),
    ],
    ids=["data parallel", "fsdp2"],
)
def test_two_processes_train_one_expert(tmp_path: Path, recipe: str, output: str, changes: list[str]) -> None:
    if changes:
        pytest.importorskip("trl", reason="the trl extra brings it")
    done = launched(tmp_path, recipe, *changes)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / f"{output}-quick"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4
    assert result["scores"]
    lines = (folder / "mergeready" / "history.jsonl").read_text().splitlines()
    probes = [record["step"] for record in map(json.loads, lines) if record["kind"] == "probe"]
    assert probes == sorted(set(probes)), "one process records"
    assert probes[-1] == 4
    assert list((folder / "expert").glob("*.safetensors"))


@pytest.mark.slow
def test_a_team_says_that_its_members_take_turns(tmp_path: Path) -> None:
    done = launched(tmp_path, "team/text.yaml")
    assert done.returncode != 0
    assert "members of a team train one after the other in one process" in " ".join(done.stderr.split())
