"""File level validation of large experts against reading the same files from front to back.

    python -m benchmarks.validation
    python -m benchmarks.validation healthy

Makes full models of 0.25 and 1 GB in float32 and bfloat16 with random values, and for each measures in a process of
its own, one thread, files in the page cache: a sequential read by pieces of a megabyte, and `validate(level="file")`.
Both take the best of twelve. The page cache makes reading as fast as it can be, so that the ratio is the lowest there
is: from a disk, checking hides behind waiting. Peak memory is of the whole
process, imports included; before values are read and at the end.

The second command validates real fine-tuned experts as they would be shared, and notes every check of files and base
that fails: false alarms. MiniLM-L6 of eight text tasks at three steps each, as whole models; and MiniLM-L3 at two steps
of each task, as LoRA adapters of two kinds. Adapters of all linear layers hold one for the pooler, which no loss
reaches: that F004 says so is right, and counted apart. Beside the alarms is how the figures of checks with thresholds
are spread.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).parent / "results" / "validation.json"
SIZES = (0.25, 1.0)
DTYPES = (torch.float32, torch.bfloat16)
HEALTHY_STEPS = (64, 128, 256)
L3 = "sentence-transformers/paraphrase-MiniLM-L3-v2"
REVISION = "0" * 40
UNTRAINED = "1 of 19 modules change nothing: base_model.model.pooler.dense"
RUNS, PIECE, ROWS, COLUMNS = 12, 2**20, 1024, 4096


def write(folder: Path, gigabytes: float, dtype: torch.dtype) -> Path:
    folder.mkdir()
    count = round(gigabytes * 1e9 / (ROWS * COLUMNS * dtype.itemsize))
    values = torch.randn(ROWS, COLUMNS).to(dtype)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": values.clone() for i in range(count)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "net"}')
    return folder


def read(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def peak_mb() -> float:
    """Peak resident memory of this program; getrusage would count what its parent had."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(folder: Path) -> dict[str, float]:
    from mergeready.validation import validate

    torch.set_num_threads(1)
    path = folder / "model.safetensors"
    read(path)
    start_mb = peak_mb()
    validate(folder, level="file")
    wall: dict[str, list[float]] = {"read": [], "validate": []}
    cpu: dict[str, list[float]] = {"read": [], "validate": []}
    for _ in range(RUNS):
        for name, act in (("read", lambda: read(path)), ("validate", lambda: validate(folder, level="file"))):
            start, used = time.perf_counter(), time.process_time()
            act()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    size = path.stat().st_size / 1e9
    return {
        "gigabytes": round(size, 3),
        "read_wall_s": round(min(wall["read"]), 3),
        "read_cpu_s": round(min(cpu["read"]), 3),
        "validate_wall_s": round(min(wall["validate"]), 3),
        "validate_cpu_s": round(min(cpu["validate"]), 3),
        "share_of_read_speed_wall": round(min(wall["read"]) / min(wall["validate"]), 3),
        "share_of_read_speed_cpu": round(min(cpu["read"]) / min(cpu["validate"]), 3),
        "peak_mb": round(peak_mb(), 1),
        "peak_before_values_mb": round(start_mb, 1),
    }


def healthy() -> None:
    """Validate experts that are known to be good."""
    results = json.loads(RESULTS.read_text())
    results["healthy experts"] = _alarms(*_full_experts())
    results["healthy adapters"] = _alarms(*_adapters())
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def _full_experts() -> tuple[Path, Iterator[tuple[str, Path]]]:
    from benchmarks.suites.backbones import minilm_l6
    from benchmarks.suites.text import TEXT_SUITE
    from benchmarks.text_experts import ExpertSpec, encoder, train_expert

    def folders() -> Iterator[tuple[str, Path]]:
        for step in HEALTHY_STEPS:
            for task in TEXT_SUITE:
                train_expert(ExpertSpec(task=task))
                with tempfile.TemporaryDirectory() as place:
                    model = encoder()
                    model.load_state_dict(load_file(ExpertSpec(task=task).checkpoint(step)), strict=False)
                    model.save_pretrained(place)
                    (Path(place) / "README.md").write_text(_card("all-MiniLM-L6-v2"), encoding="utf-8")
                    yield f"{task}/{step}", Path(place)

    return minilm_l6(), folders()


def _adapters() -> tuple[Path, Iterator[tuple[str, Path]]]:
    from benchmarks.suites.backbones import minilm_l3
    from benchmarks.text_adapters import STEPS, TASKS, AdapterSpec, suite, train_adapter

    def folders() -> Iterator[tuple[str, Path]]:
        for kind in TASKS:
            for task in TASKS[kind]:
                train_adapter(AdapterSpec(task=task, kind=kind), suite)
                for step in STEPS:
                    with tempfile.TemporaryDirectory() as place:
                        shared = Path(place) / "expert"
                        shutil.copytree(AdapterSpec(task=task, kind=kind).checkpoint(step), shared)
                        # PEFT writes where the base lay and no revision, which are findings of their own.
                        path = shared / "adapter_config.json"
                        named = {"base_model_name_or_path": L3, "revision": REVISION}
                        path.write_text(json.dumps(json.loads(path.read_text()) | named))
                        (shared / "README.md").write_text(_card("paraphrase-MiniLM-L3-v2"), encoding="utf-8")
                        yield f"{kind}: {task}/{step}", shared

    return minilm_l3(), folders()


def _card(base: str) -> str:
    return f"---\nbase_model: sentence-transformers/{base}\nlicense: apache-2.0\n---\n# An expert\n"


def _alarms(base: Path, experts: Iterator[tuple[str, Path]]) -> dict[str, Any]:
    from mergeready.experts import Base
    from mergeready.validation import validate

    opened, alarms, said, names = Base.open(base), {}, {}, []
    ran: set[str] = set()
    right = 0
    values: dict[str, list[float]] = {}
    for name, folder in experts:
        verdicts = validate(folder, opened, level="base").verdicts
        names.append(name)
        ran |= {v.id for v in verdicts if v.status != "not checked"}
        failed = [v for v in verdicts if v.status == "failed"]
        # Information is no alarm, but what is said of a healthy expert's change should be rare.
        right += any(v.message == UNTRAINED for v in failed)
        if found := {v.id: v.message for v in failed if v.severity != "info" and v.message != UNTRAINED}:
            alarms[name] = found
        if found := {v.id: v.message for v in failed if v.severity == "info" and v.id[0] == "D"}:
            said[name] = found
        for verdict in verdicts:
            if verdict.threshold is not None and verdict.value is not None:
                values.setdefault(verdict.id, []).append(verdict.value)
        print(name, alarms.get(name), said.get(name), flush=True)
    return {
        "experts": len(names),
        "false_alarms": alarms,
        "untrained_modules_found": right,
        "said_of_their_change": said,
        "checks_that_ran": sorted(ran),
        "values": {
            check: {"n": len(found), "median": round(median(found), 4), "largest": round(max(found), 4)}
            for check, found in sorted(values.items())
        },
    }


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for dtype in DTYPES:
            for size in SIZES:
                name = f"{size} GB {str(dtype).removeprefix('torch.')}"
                folder = write(Path(place) / name, size, dtype)
                command = [sys.executable, "-m", "benchmarks.validation", str(folder)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name] = json.loads(out)
                (folder / "model.safetensors").unlink()
                print(name, found[name], flush=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["healthy"]:
        healthy()
    elif len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
