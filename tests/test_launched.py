"""Two ranks, started as users start them, and killed: resumed, the run ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launched import main
from tests.ranks import run_ranks
from tests.training.small import Net, expert, save

pytestmark = pytest.mark.slow

LAUNCHERS = {
    # With `--cpu`, `accelerate launch` starts one process whatever `--num_processes` says, unless there is MPI. With
    # `--multi_gpu` it starts them as torchrun does, and needs no accelerator; the script itself asks for the CPU.
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"),
    ],
    "fabric": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
}
KILL_AT = 7


def launch(name: str, world: Path, folder: Path, killed: str = "", resume: Path | None = None) -> int:
    arguments = [name, str(world), str(folder), str(KILL_AT), killed, str(resume or "")]
    command = [sys.executable, "-m", *LAUNCHERS[name], "tests.launched", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert killed or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def files(folder: Path) -> dict[Path, bytes]:
    """All but what fabric's runs share beside picks, which names the run's folder."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md" and not re.search("report|fingerprint", path.name)
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, and a run that nothing interrupted; neither launchers nor shells make a difference to what it leaves."""
    world = tmp_path_factory.mktemp("world")
    save(Net(), world / "base")
    save(expert(2), world / "peer")
    run_ranks(uninterrupted, 2, world)
    return world


def uninterrupted(world: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    main("accelerate", world, world / "whole", set(), None)


@pytest.mark.parametrize(("name", "killed"), [("accelerate", "0,1"), ("fabric", "1")])
def test_a_launched_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(
    world: Path, tmp_path: Path, name: str, killed: str
) -> None:
    """By SIGKILL: of the whole machine, or of one rank, at which the launcher ends the other."""
    whole, cut = world / "whole", tmp_path
    assert launch(name, world, cut, killed) != 0
    assert not (cut / "weights.pt").exists()
    lines = (cut / "mergeready/history.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6  # beyond the checkpoint, and to be taken back
    launch(name, world, cut, resume=cut / "checkpoint-4")
    ours, expected = torch.load(cut / "weights.pt"), torch.load(whole / "weights.pt")
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert not torch.equal(expected["head.weight"], Net().head.weight)
    left, right = files(cut / "mergeready"), files(whole / "mergeready")
    assert left[Path("history.jsonl")] == right[Path("history.jsonl")]
    assert left.keys() - right.keys() <= {Path("history.superseded.jsonl")}
    picks = [path for path in right if path.parts[0] == "picks"]
    assert picks
    assert all(left[path] == right[path] for path in picks)
    assert any(cut.rglob("mergeready-report.json")) == (name == "fabric")
