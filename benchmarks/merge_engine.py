"""What merging costs: this engine, mergekit, and reading everything and adding it, each a process of its own.

    python -m benchmarks.merge_engine                                   # this engine and the limit
    python -m benchmarks.merge_engine --mergekit-python venv/bin/python # and mergekit 0.1.5
    python -m benchmarks.merge_engine --only ties --again

Models: bf16 Llamas of 498 million parameters in three shards, made in a temporary folder. Each process runs with
one OpenMP thread on a warm page cache; CPU seconds are user and system time of the whole process, memory is the
peak of its anonymous pages, sampled every 10 ms. Cells that are in results/merge_engine.json already are not run
again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.worlds import make_adapters, make_llamas, make_many_tensors

HERE = Path(__file__).parent
RESULT, TABLE = HERE / "results" / "merge_engine.json", HERE / "results" / "merge_engine.md"

METHODS: dict[str, tuple[str, dict[str, float], str, dict[str, float]]] = {
    # here to (our name, parameters, mergekit's name, parameters)
    "linear": ("average", {}, "linear", {}),
    "task_arithmetic": ("task_arithmetic", {}, "task_arithmetic", {}),
    "dare_ties": ("dare_ties", {"density": 0.5}, "dare_ties", {"density": 0.5}),
    "ties": ("ties", {"density": 0.2}, "ties", {"density": 0.2}),
    "breadcrumbs": (
        "breadcrumbs",
        {"density": 0.84, "gamma": 0.01},
        "breadcrumbs",
        {"density": 0.84, "gamma": 0.01},
    ),
    "della": ("della", {"density": 0.5, "epsilon": 0.1}, "della", {"density": 0.5, "epsilon": 0.1}),
}
GOALS = {"linear": 1.5, "task_arithmetic": 1.5, "dare_ties": 6, "ties": 6, "breadcrumbs": 10, "della": 10}


@dataclass(frozen=True)
class Cell:
    """One measured process."""

    key: str
    command: Sequence[str]
    world: str = "llama"
    experts: int = 0


def cells(mergekit: str | None) -> list[Cell]:
    """Every cell in the order in which they run: the engines alternate, cheap cells first."""
    own, limit = [sys.executable, "-m", "benchmarks.engines.own"], str(HERE / "engines" / "limit.py")
    theirs = [mergekit, str(HERE / "engines" / "theirs.py")] if mergekit else None
    found = [Cell("import/0/mergeready", own), Cell("import/0/limit", [sys.executable, limit])]
    if theirs:
        found.append(Cell("import/0/mergekit", theirs))
    for count in (3, 8, 32):
        if count < 32:
            found.append(Cell(f"limit/{count}/limit", [sys.executable, limit, "OUT", "BASE"], experts=count))
        for method, (name, parameters, their_name, their_parameters) in METHODS.items():
            if count == 32 and method not in ("linear", "ties", "dare_ties"):
                continue
            arguments = [name, json.dumps(parameters), "OUT", "BASE"]
            found.append(Cell(f"{method}/{count}/mergeready", [*own, *arguments], experts=count))
            if theirs and count < 32:
                arguments = [their_name, json.dumps(their_parameters), "OUT", "BASE"]
                found.append(Cell(f"{method}/{count}/mergekit", [*theirs, *arguments], experts=count))
    for tensors in (4750, 9500, 19000):
        arguments = ["task_arithmetic", "{}", "OUT", "BASE"]
        found.append(Cell(f"tensors/{tensors}/mergeready", [*own, *arguments], f"many-{tensors}", 3))
        planner = [sys.executable, "-m", "benchmarks.engines.plan", "BASE"]
        found.append(Cell(f"plan/{tensors}/mergeready", planner, f"many-{tensors}", 3))
    arguments = ["task_arithmetic", json.dumps({"scale": 0.1}), "OUT", "BASE"]
    found.append(Cell("adapters/100/mergeready", [*own, *arguments], "adapters", 100))
    return found


def prepare(cell: Cell, root: Path) -> list[str]:
    """Make the cell's inputs, warm the page cache, and put paths into its command."""
    if not cell.experts:
        return list(cell.command)
    folder, kind = root / cell.world, "expert"
    base = folder / "base"
    if cell.world == "llama":
        make_llamas(folder, cell.experts)
    elif cell.world == "adapters":
        make_llamas(root / "llama", 0)
        make_adapters(folder, cell.experts)
        base, kind = root / "llama" / "base", "adapter"
    else:
        make_many_tensors(folder, int(cell.world.removeprefix("many-")), cell.experts)
    inputs = [base, *(folder / f"{kind}-{i}" for i in range(cell.experts))]
    for path in {p.stat().st_ino: p for i in inputs for p in i.glob("*.safetensors")}.values():
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    output = root / "out"
    shutil.rmtree(output, ignore_errors=True)
    places = {"OUT": [str(output)], "BASE": [str(path) for path in inputs]}
    return [part for word in cell.command for part in places.get(word, [word])]


def measure(command: list[str]) -> dict[str, Any]:
    """CPU and wall seconds of a process, and the peak of its anonymous memory in bytes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "0",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    peak, started = 0, time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command} failed:\n{log.read().decode(errors='replace')[-3000:]}")
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(time.perf_counter() - started, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "peak_anonymous_bytes": peak,
        "minor_faults": usage.ru_minflt,
    }


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def page(machines: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as markdown, a table for each machine: what ran on different ones is not compared."""
    lines = [
        "# What merging costs",
        "",
        "Generated by `python -m benchmarks.merge_engine`.",
        "",
        "CPU seconds of the whole process, one thread. Work is without the import; × limit compares it with reading "
        "all inputs, adding in fp32 and writing.",
        "Cells are measured one by one, at different hours of a shared machine; see `benchmarks/README.md`.",
    ]
    for machine, found in machines.items():
        lines += ["", f"## {machine}", "", *table(found)]
    return "\n".join(lines) + "\n"


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The cells of one machine, with what each costs against the limit and against mergekit."""
    lines = [
        "| merge | experts | engine | CPU s | work s | × limit | mergekit / ours | goal | wall s | peak MB | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in found.items():
        kind, count, engine = key.split("/")
        imported = found.get(f"import/0/{engine}", {}).get("cpu_seconds", 0.0)
        work = cell["cpu_seconds"] - (imported if kind != "import" else 0)
        limit = _work(found, f"limit/{count}/limit")
        theirs = found.get(f"{kind}/{count}/mergekit") if engine == "mergeready" else None
        times = f"{work / limit:.2f}" if limit and kind in METHODS else ""
        ratio = f"{theirs['cpu_seconds'] / cell['cpu_seconds']:.1f}" if theirs else ""
        goal = GOALS.get(kind) if engine == "mergeready" and int(count) < 32 else None
        wanted = "" if goal is None else f"≤ {goal} × limit" if goal == 1.5 else f"≥ {goal} × fewer"
        memory, faults = cell["peak_anonymous_bytes"] / 1e6, cell["minor_faults"]
        lines.append(
            f"| {kind} | {count} | {engine} | {cell['cpu_seconds']:.1f} | {work:.1f} | {times} | {ratio} | {wanted} "
            f"| {cell['wall_seconds']:.1f} | {memory:.0f} | {faults} |"
        )
    return lines


def _work(found: dict[str, dict[str, Any]], key: str) -> float:
    if key not in found:
        return 0.0
    imported = found.get(f"import/0/{key.split('/')[-1]}", {}).get("cpu_seconds", 0.0)
    return float(found[key]["cpu_seconds"] - imported)


def describe() -> str:
    models = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", models)
    return f"{os.cpu_count()} cores, {name[1] if name else platform.machine()}, shared with other work"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit-python", help="a Python that has mergekit 0.1.5")
    parser.add_argument("--only", default="", help="regular expression on cells, such as ties/3/")
    parser.add_argument("--again", action="store_true", help="run cells that are there already")
    parser.add_argument("--folder", type=Path, help="keep models here instead of in a temporary folder")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    machines = json.loads(options.result.read_text())["machines"] if options.result.exists() else {}
    found = machines.setdefault(describe(), {})
    everything = cells(options.mergekit_python)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        for cell in everything:
            if re.search(options.only, cell.key) and (options.again or cell.key not in found):
                found[cell.key] = measure(prepare(cell, root))
                print(cell.key, found[cell.key], flush=True)
                _save(options.result, machines, [cell.key for cell in cells("python")])
        shutil.rmtree(root / "out", ignore_errors=True)
    print("\n".join(table(found)))


def _save(path: Path, machines: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Write the results in the order of the cells, not in that in which they were run."""
    ordered = {
        machine: {key: found[key] for key in order if key in found} for machine, found in machines.items()
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machines": ordered}, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
