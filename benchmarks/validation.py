"""File level validation of large experts against reading the same files from front to back.

    python -m benchmarks.validation

Makes full models of 0.25 and 1 GB in float32 and bfloat16 with random values, and for each measures in a process of
its own, one thread, files in the page cache: a sequential read by pieces of a megabyte, and `validate(level="file")`.
Both take the best of twelve. The page cache makes reading as fast as it can be, so that the ratio is the lowest there
is: from a disk, checking hides behind waiting. Peak memory is of the whole
process, imports included; before values are read and at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "validation.json"
SIZES = (0.25, 1.0)
DTYPES = (torch.float32, torch.bfloat16)
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
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
