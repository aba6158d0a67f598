"""What starting the command line costs: `mergeready --help` against `import transformers`, in CPU seconds.

    python -m benchmarks.cli_start           # writes benchmarks/results/cli_start.json

Each measurement is a process of its own, user and system time of it and its children, on one thread; the two
alternate, so that both see the same machine. One run of each before that fills the caches of files and bytecode.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.merge_engine import describe

RESULT = Path(__file__).parent / "results" / "cli_start.json"
COMMANDS = {
    "mergeready --help": [sys.executable, "-m", "mergeready.cli", "--help"],
    "import transformers": [sys.executable, "-c", "import transformers"],
}
REPEATS, GOAL = 5, 0.6


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of one process that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure() -> dict[str, Any]:
    """All runs of both, their medians and the ratio of those."""
    for command in COMMANDS.values():
        cpu_seconds(command)
    runs: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            runs[name].append(round(cpu_seconds(command), 3))
    ours, theirs = (median(seconds) for seconds in runs.values())
    return {"cpu_seconds": runs, "median": {"ours": ours, "theirs": theirs}, "ratio": round(ours / theirs, 3)}


def main() -> None:
    content = {"machine": describe(), "goal": GOAL, **measure()}
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
