"""Every recipe and every example as a newcomer runs them: does it run, what does it cost, what does it show?

    python -m benchmarks.walkthrough           # writes benchmarks/results/walkthrough.json and what is made from it

Each is a process of its own in an empty folder, on one thread, offline. First all recipes and examples in their quick
versions. Then each recipe once more for its page: as it is where model and data come with mergeready, else its quick
version with more steps. The curves and costs in recipes/ are written from that, never by hand. What was measured is
kept; ``--again PATTERN`` measures it anew, ``--pages`` only writes pages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.merge_engine import describe
from benchmarks.walkthrough_pages import draw, write_pages

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "walkthrough.json"
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
EXAMPLES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py") if path.name != "languages.py"
)

_LONGER = "--quick --set optimisation.save_every=60 --set mergeready.probe.max_evaluations=5"
_TINY = f"{_LONGER} --set optimisation.learning_rate=2e-3 --set optimisation.batch_size=16"
_SIZES = "--set data.limit.train=640 --set data.limit.validation=120 --set data.limit.test=160"
_TEAM = f"{_TINY} {_SIZES} --set optimisation.steps=240 --set mergeready.probe.schedule.every=20"
_TEXTS = f"{_TINY} {_SIZES} --set optimisation.steps=120 --set mergeready.probe.schedule.every=20"
SHOWN = {
    "recipes/hub/clip_vit_b32_8tasks.yaml": _TEAM,
    "recipes/hub/llama_8b_lora_fsdp2.yaml": _TEXTS,
    "recipes/joint/text.yaml": "",
    "recipes/lm/sft_full.yaml": _TEXTS,
    "recipes/lm/sft_lora.yaml": _TEXTS,
    "recipes/paper/protocol.yaml": _TEAM,
    "recipes/team/text.yaml": "",
    "recipes/text/full.yaml": "",
    "recipes/text/lora.yaml": "",
    "recipes/vision/full.yaml": _TEAM,
}
"""What a recipe's page shows: the recipe as it is, or a longer quick version, by its options."""


def commands() -> dict[str, list[str]]:
    """Every command by its name, as it is typed, in the order in which they are run."""
    made = {f"{path} --quick": ["mergeready", "train", path, "--quick"] for path in RECIPES}
    for path in EXAMPLES:
        quick = [] if path.endswith("validate_in_ci.py") else ["--quick"]
        made[path] = ["python", Path(path).name, *quick]
    return made | {path: ["mergeready", "train", path, *shlex.split(SHOWN[path])] for path in RECIPES}


def run(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command in a folder: its seconds, and what it printed last.

    Raises:
        RuntimeError: If it fails.
    """
    program = {
        "mergeready": [sys.executable, "-m", "mergeready.cli"],
        "python": [sys.executable],
    }[words[0]]
    paths = [str(ROOT / word) if word.startswith("recipes/") else word for word in words[1:]]
    if words[0] == "python":
        paths[0] = str(ROOT / "examples" / paths[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([*program, *paths], cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"command": shlex.join(words), "cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}


def shown(path: str, folder: Path) -> dict[str, Any]:
    """The result of a recipe that was run in a folder; its curve is drawn beside it."""
    output = min(
        folder.rglob("result.json"), key=lambda path: len(path.parts)
    ).parent  # a team's members lie below
    figure = Figure()
    draw(figure, output)
    figure.savefig(
        (ROOT / path).with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05
    )
    return {"result": json.loads((output / "result.json").read_text(encoding="utf-8"))}


def measure(again: str | None) -> dict[str, Any]:
    """Run what was not run yet; the file is written after each."""
    content: dict[str, Any] = {"machine": describe(), "runs": {}}
    if RESULT.is_file():
        content["runs"] = json.loads(RESULT.read_text(encoding="utf-8"))["runs"]
    wanted = commands()
    content["runs"] = {name: cell for name, cell in content["runs"].items() if name in wanted}
    for name, words in wanted.items():
        if name in content["runs"] and not (again and re.search(again, name)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            cell = run(words, Path(folder))
            if name in RECIPES:
                cell |= shown(name, Path(folder))
        content["runs"][name] = cell
        content["runs"] = {key: content["runs"][key] for key in wanted if key in content["runs"]}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{cell['cpu_seconds']:7.1f} s  {name}", flush=True)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", help="regular expression on names of runs to measure anew")
    parser.add_argument("--pages", action="store_true", help="write pages from what was measured")
    options = parser.parse_args()
    content = json.loads(RESULT.read_text("utf-8")) if options.pages else measure(options.again)
    write_pages(ROOT, content)


if __name__ == "__main__":
    main()
