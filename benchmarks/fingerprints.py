"""Fingerprints against what they estimate, on real experts; and how long comparing many of them takes.

    python -m benchmarks.fingerprints

Accuracy: MiniLM-L6 experts of eight text tasks at six training steps each, every pair of one step, default budget. A
pair's error is its estimate minus the exact figure, and counts as covered where it is at most two standard errors. All
pairs share one draw of coordinates, as all fingerprints of one base do.

Scale: synthetic fingerprints with the shapes of a language model of 1.2 billion parameters, compared from their files
in a process of its own on one thread; its peak memory, imports included. 10,000 are extrapolated from a fit a·n + b·n²
to CPU time.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeready.experts.coordinates import sample_count
from mergeready.experts.fingerprint import BUDGET, Fingerprint
from mergeready.experts.identity import BaseIdentity

RESULTS = Path(__file__).parent / "results" / "fingerprints.json"
STEPS = (8, 16, 32, 64, 128, 256)
COUNTS = (250, 500, 1000, 2000)
FAR = 10_000
THREADS = 1


def accuracy() -> dict[str, Any]:
    from benchmarks.suites.backbones import minilm_l6
    from benchmarks.suites.text import TEXT_SUITE
    from benchmarks.text_experts import ExpertSpec
    from mergeready.experts import Base, open_expert
    from mergeready.metrics.all_pairs import compare_fingerprints
    from mergeready.metrics.compare import compare_vectors
    from mergeready.metrics.take_fingerprint import take_fingerprint

    base = Base.open(minilm_l6())
    rows: list[dict[str, float]] = []
    sizes, seconds = [], []
    with tempfile.TemporaryDirectory() as place:
        for step in STEPS:
            paths = [ExpertSpec(task=task).checkpoint(step) for task in TEXT_SUITE]
            vectors = [open_expert(path, base, strict=False).vector for path in paths]
            began = time.process_time()
            prints = [take_fingerprint(vector, base) for vector in vectors]
            seconds.append((time.process_time() - began) / len(prints))
            files = [f.save(Path(place) / f"{i}.fingerprint.safetensors") for i, f in enumerate(prints)]
            sizes += [file.stat().st_size for file in files]
            exact, found = compare_vectors(vectors, base.source), compare_fingerprints(files)
            rows += _errors(step, exact, found)
            print(step, rows[-1], flush=True)
    return {
        "pairs": len(rows),
        "file_kb": round(max(sizes) / 1000, 1),
        "take_cpu_s": round(max(seconds), 2),
        "by_step": {str(step): _summary([r for r in rows if r["step"] == step]) for step in STEPS},
        "all": _summary(rows),
    }


def _errors(step: int, exact: Any, found: Any) -> list[dict[str, float]]:
    rows = []
    for i in range(len(exact.labels)):
        for j in range(i):
            rows.append(
                {
                    "step": step,
                    "cosine": found.cosine[i][j] - exact.cosine[i][j],
                    "cosine_error": found.cosine_error[i][j],
                    "sign": found.sign_conflict[i][j] - exact.sign_conflict[i][j],
                    "sign_error": found.sign_error[i][j],
                }
            )
    return rows


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for kind in ("cosine", "sign"):
        errors = np.array([row[kind] for row in rows])
        stated = np.array([row[f"{kind}_error"] for row in rows])
        summary |= {
            f"{kind}_worst": round(float(np.abs(errors).max()), 5),
            f"{kind}_rms": round(float(np.sqrt((errors**2).mean())), 5),
            f"{kind}_stated": round(float(np.sqrt((stated**2).mean())), 5),
            f"{kind}_covered": round(float((np.abs(errors) <= 2 * stated).mean()), 3),
        }
    return summary


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Parameters of a model with 1.2 billion of them: 16 layers of width 2048."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_256, 2048)}
    for layer in range(16):
        for part, shape in {
            "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192), "input_layernorm": (2048,), "post_attention_layernorm": (2048,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    return shapes | {"model.norm.weight": (2048,)}


def write_synthetic(folder: Path, count: int) -> list[Path]:
    shapes = llama_shapes()
    total = sum(math.prod(shape) for shape in shapes.values())
    base = BaseIdentity({name: f"{i:016x}" for i, name in enumerate(shapes)})
    counts = [sample_count(math.prod(shape), total, BUDGET) for shape in shapes.values()]
    paths = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        pieces = torch.split(1e-4 * torch.randn(sum(counts), generator=generator), counts)
        norms = {name: 1e-4 * math.sqrt(math.prod(shape)) for name, shape in shapes.items()}
        subspaces = {
            name: torch.randn(4, 64, generator=generator) for name, shape in shapes.items() if len(shape) == 2
        }
        samples = dict(zip(shapes, pieces, strict=True))
        made = Fingerprint(f"e{index}", base, shapes, norms, samples, subspaces, total)
        paths.append(made.save(folder / f"{index}.fingerprint.safetensors"))
    return paths


def measure(folder: Path, count: int) -> dict[str, float]:
    """Compare files in this process."""
    from mergeready.metrics.all_pairs import compare_all

    torch.set_num_threads(THREADS)
    paths = [folder / f"{i}.fingerprint.safetensors" for i in range(count)]
    wall, cpu = time.perf_counter(), time.process_time()
    found = compare_all(paths)
    off = found.cosine[~np.eye(count, dtype=bool)]
    return {
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cosine_std": round(float(off.std()), 6),
    }


def scale() -> dict[str, Any]:
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        paths = write_synthetic(Path(place), max(COUNTS))
        size = paths[0].stat().st_size
        for count in COUNTS:
            command = [sys.executable, "-m", "benchmarks.fingerprints", place, str(count)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured[str(count)] = json.loads(out)
            print(count, measured[str(count)], flush=True)
    n = np.array(COUNTS, dtype=float)
    cpu = np.array([measured[str(count)]["cpu_s"] for count in COUNTS])
    # Relative residuals, so that small counts weigh as much as large ones.
    (linear, square), *_ = np.linalg.lstsq(np.stack([n, n**2], 1) / cpu[:, None], np.ones(len(n)), rcond=None)
    results_mb = 8 * FAR**2 / 1e6
    small = measured[str(COUNTS[0])]["peak_mb"]
    return {
        "threads": THREADS,
        "file_kb": round(size / 1000, 1),
        "measured": measured,
        "extrapolated": {
            str(FAR): {
                "cpu_s": round(float(linear * FAR + square * FAR**2)),
                "peak_mb": round(small + results_mb),
            }
        },
        "fit": {"cpu_s_per_expert": round(float(linear), 5), "cpu_s_per_pair": float(f"{2 * square:.3g}")},
    }


def markdown(found: dict[str, Any]) -> str:
    a, s = found["accuracy"], found["scale"]
    lines = [
        "# Fingerprints, measured",
        "",
        "Made by `python -m benchmarks.fingerprints`.",
        "",
        f"## Estimates against exact figures: {a['pairs']} pairs of real experts",
        "",
        f"MiniLM-L6 experts of eight text tasks, every pair of one training step, default budget ({BUDGET} "
        f"coordinates); a file has {a['file_kb']} kB, and taking one costs {a['take_cpu_s']} CPU seconds. "
        "*Covered*: within two stated standard errors; all pairs share one draw of coordinates.",
        "",
        "| step | cosine: worst error | rms | stated | covered | sign conflict: worst error | rms | stated | covered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for step, row in [*a["by_step"].items(), ("all", a["all"])]:
        cells = [
            row[f"{kind}_{what}"]
            for kind in ("cosine", "sign")
            for what in ("worst", "rms", "stated", "covered")
        ]
        lines.append(f"| {step} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    lines += [
        "",
        "## Comparing many",
        "",
        f"Synthetic fingerprints of a model with 1.2 billion parameters, {s['file_kb']} kB each, from their files, "
        "one thread on a machine that others used as well; peak memory of the whole process.",
        "",
        "| fingerprints | wall s | CPU s | peak MB | |",
        "|---|---|---|---|---|",
    ]
    for count, row in s["measured"].items():
        lines.append(f"| {count} | {row['wall_s']} | {row['cpu_s']} | {row['peak_mb']} | measured |")
    for count, row in s["extrapolated"].items():
        lines.append(f"| {count} | | {row['cpu_s']} | {row['peak_mb']} | extrapolated |")
    fit = s["fit"]
    lines += [
        "",
        f"CPU time grows as {1000 * fit['cpu_s_per_expert']:.2g} ms an expert and {1e6 * fit['cpu_s_per_pair']:.3g} µs "
        "a pair; memory as 8 bytes for each of the n² results beside two blocks of 256 experts.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, part in (("accuracy", accuracy), ("scale", scale)):
        if name in sys.argv[1:] or len(sys.argv) == 1:
            found[name] = part()
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
