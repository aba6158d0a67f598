"""Recipes in a job of two processes: they train as one, or say why they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mergeready.cli import app
from mergeready.errors import UnsupportedError
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(folder: Path, *arguments: str) -> None:
    """By torchrun, as users start it."""
    done = subprocess.run(
        [*LAUNCH, "-m", "mergeready.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def forked(folder: Path, *arguments: str) -> None:
    """In processes that need not import everything again."""
    run_ranks(on_a_rank, 2, folder, arguments)


def on_a_rank(folder: Path, arguments: Sequence[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    os.chdir(folder)
    app(arguments, standalone_mode=False)


def quick(recipe: str, *changes: str) -> list[str]:
    options = [word for change in changes for word in ("--set", change)]
    return ["train", str(ROOT / "recipes" / recipe), "--quick", *options]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "recipe", "output", "changes"),
    [
        (launched, "text/full.yaml", "text-full", []),
        (forked, "hub/llama_8b_lora_fsdp2.yaml", "llama-8b-lora", ["optimisation.sharding=fsdp2"]),
    ],
    ids=["data parallel", "fsdp2"],
)
def test_two_processes_train_one_expert(
    tmp_path: Path, start: Callable[..., None], recipe: str, output: str, changes: list[str]
) -> None:
    if changes:
        pytest.importorskip("trl", reason="the trl extra brings it")
    start(tmp_path, *quick(recipe, *changes))
    folder = tmp_path / "runs" / f"{output}-quick"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4
    assert result["scores"]
    lines = (folder / "mergeready" / "history.jsonl").read_text().splitlines()
    probes = [record["step"] for record in map(json.loads, lines) if record["kind"] == "probe"]
    assert probes == sorted(set(probes)), "one process records"
    assert probes[-1] == 4
    assert list((folder / "expert").glob("*.safetensors"))


def test_a_team_says_that_its_members_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each process that torchrun starts, before there is a process group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedError, match="members of a team train one after the other in one process"):
        app(quick("team/text.yaml"), standalone_mode=False)
