"""File level validation of large experts against reading the same files from front to back.

    python -m benchmarks.validation
    python -m benchmarks.validation healthy

Makes full models of 0.25 and 1 GB in float32 and bfloat16 with random values, and for each measures in a process of
its own, one thread, files in the page cache: a sequential read by pieces of a megabyte, and `validate(level="file")`.
Both take the best of twelve. The page cache makes reading as fast as it can be, so that the ratio is the lowest there
is: from a disk, checking hides behind waiting. Peak memory is of the whole
process, imports included; before values are read and at the end.

The second command validates real fine-tuned experts, MiniLM-L6 of eight text tasks at three steps each, as whole models
with a card, and notes every check of files and base that fails: false alarms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).parent / "results" / "validation.json"
SIZES = (0.25, 1.0)
DTYPES = (torch.float32, torch.bfloat16)
HEALTHY_STEPS = (64, 128, 256)
CARD = "---\nbase_model: sentence-transformers/all-MiniLM-L6-v2\nlicense: apache-2.0\n---\n# An expert\n"
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
    from benchmarks.suites.backbones import minilm_l6
    from benchmarks.suites.text import TEXT_SUITE
    from benchmarks.text_experts import ExpertSpec, encoder
    from mergeready.experts import Base
    from mergeready.validation import validate

    base, alarms, ran, names = Base.open(minilm_l6()), {}, set(), []
    for step in HEALTHY_STEPS:
        for task in TEXT_SUITE:
            with tempfile.TemporaryDirectory() as place:
                model = encoder()
                model.load_state_dict(load_file(ExpertSpec(task=task).checkpoint(step)), strict=False)
                model.save_pretrained(place)
                (Path(place) / "README.md").write_text(CARD, encoding="utf-8")
                verdicts = validate(place, base, level="base").verdicts
            names.append(f"{task}/{step}")
            ran |= {v.id for v in verdicts if v.status != "not checked"}
            # An expert that nothing of ours trained has no record, which is information and no alarm.
            found = {v.id: v.message for v in verdicts if v.status == "failed" and v.severity != "info"}
            if found:
                alarms[names[-1]] = found
            print(names[-1], found, flush=True)
    results = json.loads(RESULTS.read_text())
    results["healthy experts"] = {
        "experts": len(names),
        "false_alarms": alarms,
        "checks_that_ran": sorted(ran),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


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
