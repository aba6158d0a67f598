"""Merging 100 adapters of rank 16 into one, and compressing without the dense matrix.

`python -m benchmarks.adapters` writes results/adapters.json. The base has the shape of a 0.5 B-parameter Qwen2.5;
adapters are random bf16 factors, on query and value or on all seven linear layers. Times are of whole calls: open,
check, merge, write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergeready.experts import Base
from mergeready.experts.delta import LowRank
from mergeready.merging.adapters import merge_adapters
from mergeready.merging.adapters.compress import concatenated, truncated

HIDDEN, MLP, KV, LAYERS, VOCABULARY = 896, 4864, 128, 24, 151_936
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
TARGETS = {"query and value": list(LINEARS)[:2], "all linear layers": list(LINEARS)}
RESULTS = Path(__file__).parent / "results" / "adapters.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"threads": 1, "experts": arguments.experts, "rank": arguments.rank}
    results["compression of four adapters of rank 16"] = [compress(side) for side in (1024, 4096)]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, results["parameters of the base"] = write_base(root / "base")
        for name, targets in TARGETS.items():
            folders = [
                write_adapter(root / f"{len(targets)}-{seed}", targets, arguments.rank, seed)
                for seed in range(arguments.experts)
            ]
            results[name] = merges(base, folders, root / f"out-{len(targets)}", arguments.rank)
            print(name, json.dumps(results[name], indent=1), flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def merges(base: Path, folders: list[Path], out: Path, rank: int) -> dict[str, Any]:
    """The same adapters, once exactly and once cut back to their own rank."""
    opened, found = Base.open(base), {}
    for label, chosen in (("exact", "exact"), (f"compressed to rank {rank}", rank)):
        made, seconds = timed(
            lambda chosen=chosen, label=label: merge_adapters(
                opened, folders, out / label.replace(" ", "-"), "average", rank=chosen, dtype=torch.bfloat16
            )
        )
        found[label] = seconds | {
            "modules": len(made.ranks),
            "rank": max(made.ranks.values()),
            "kept energy": round(made.energy, 4),
        }
    return found


def compress(side: int) -> dict[str, Any]:
    """QR and a small eigenproblem against the dense decomposition that other libraries take."""
    generator = torch.Generator().manual_seed(0)
    deltas = [
        LowRank(
            torch.randn(side, 16, generator=generator),
            torch.randn(16, side, generator=generator),
            (side, side),
        )
        for _ in range(4)
    ]
    whole = concatenated(deltas, [0.25] * 4)
    best = min((timed(lambda: truncated(whole, 16))[1] for _ in range(5)), key=lambda t: t["wall seconds"])
    found: dict[str, Any] = {"side": side, "ours": best}
    if side <= 1024:
        found["dense SVD"] = timed(lambda: torch.linalg.svd(whole.B @ whole.A))[1]
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "wall seconds": round(time.perf_counter() - wall, 4),
        "CPU seconds": round(time.process_time() - cpu, 4),
    }


def write_base(folder: Path) -> tuple[Path, int]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
    tensors = {n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, sum(tensor.numel() for tensor in tensors.values())


def write_adapter(folder: Path, targets: list[str], rank: int, seed: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name in targets:
            rows, columns = LINEARS[name]
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[key + "A.weight"] = torch.randn(rank, columns, generator=generator).bfloat16()
            tensors[key + "B.weight"] = (0.01 * torch.randn(rows, rank, generator=generator)).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
