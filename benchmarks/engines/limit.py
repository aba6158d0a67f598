"""The least that any merge must do: read all files, add in fp32, write. Run as a process of its own.

python limit.py OUTPUT BASE EXPERT...
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(output: Path, base: Path, experts: list[Path]) -> None:
    output.mkdir()
    for shard in sorted(base.glob("*.safetensors")):
        files = [safe_open(folder / shard.name, "pt") for folder in (base, *experts)]
        merged = {}
        for name in files[0].keys():  # noqa: SIM118 - a file handle, not a mapping
            total = files[0].get_tensor(name).float()
            for file in files[1:]:
                total += file.get_tensor(name)
            merged[name] = total.to(torch.bfloat16)
        save_file(merged, output / shard.name, {"format": "pt"})


if __name__ == "__main__" and len(sys.argv) > 1:
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
