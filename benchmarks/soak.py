"""A long run with monitoring: does memory stay flat?

    python -m benchmarks.soak            # writes benchmarks/results/soak.json; some minutes

A small transformer trains for 10,000 steps in a plain loop with two peers on disk; metrics every 20 steps, probes of
two merge methods every 200. Resident memory is read every 500 steps, after the collector has run.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from mergeready import MergeReadyLoop, Peer, Probe, Schedule

RESULT = Path(__file__).parent / "results" / "soak.json"
STEPS, READ_EVERY = 10_000, 500
MEASURE_EVERY, PROBE_EVERY = 20, 200


def model() -> nn.Module:
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=4
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config)


def batch(seed: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (size, 16), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 4}


def accuracy(net: nn.Module) -> dict[str, Tensor]:
    data = batch(-1 % 2**31, 64)
    return {"accuracy": (net(input_ids=data["input_ids"]).logits.argmax(-1) == data["labels"]).float()}


def peer(folder: Path, seed: int) -> Path:
    net = model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=generator)
    net.save_pretrained(folder)
    return folder


def soak(folder: Path, steps: int) -> dict[str, Any]:
    net = model()
    net.save_pretrained(folder / "base")
    peers = [Peer(peer(folder / f"peer-{i}", i), evaluate=accuracy) for i in (1, 2)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    monitor = MergeReadyLoop(
        folder / "run",
        base=folder / "base",
        peers=peers,
        measure=Schedule(every=MEASURE_EVERY),
        probe=Probe(
            merge=["task_arithmetic", "ties"], evaluate=accuracy, schedule=Schedule(every=PROBE_EVERY)
        ),
    )
    monitor.prepare(net, total_steps=steps)
    process, resident, began = psutil.Process(), [], time.process_time()
    for step in range(1, steps + 1):
        net(**batch(step, 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if step % READ_EVERY == 0:
            gc.collect()
            resident.append([step, process.memory_info().rss])
    monitor.finish()
    early = next(value for step, value in resident if step >= steps // 5)
    return {
        "steps": steps,
        "measure_every": MEASURE_EVERY,
        "probe_every": PROBE_EVERY,
        "records": len(monitor.history),
        "resident_bytes": resident,
        "growth_after_a_fifth_bytes": resident[-1][1] - early,
        "history_bytes": (folder / "run" / "history.jsonl").stat().st_size,
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), steps)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
