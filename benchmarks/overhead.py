"""What monitoring costs a training run: time and resident memory, against the same run without the callback.

    python -m benchmarks.overhead            # writes benchmarks/results/overhead.json

Each run is a process of its own, so that peak memory is that run's; runs with and without the callback alternate.
The model is MiniLM-L6 with a frozen zero-shot head, trained whole on batches of 32 × 64 tokens, with four peers on
disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULT = Path(__file__).parent / "results" / "overhead.json"
PEERS, BATCH, TOKENS = 4, 32, 64


def make_peers(folder: Path) -> None:
    """Write the base and four experts near it, as full checkpoints."""
    import torch
    from transformers import BertModel

    from mergeready.demo.encoder import encoder_folder

    base = BertModel.from_pretrained(encoder_folder())
    base.save_pretrained(folder / "base")
    for index in range(PEERS):
        generator = torch.Generator().manual_seed(index)
        expert = BertModel.from_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
        expert.save_pretrained(folder / f"peer-{index}")


def train(folder: Path, steps: int, watched: bool) -> dict[str, float]:
    """One training run; returns seconds, peak memory and what the callback itself took."""
    import torch
    from torch.utils.data import Dataset
    from transformers import BertModel, Trainer, TrainingArguments, logging

    from mergeready.demo.encoder import ZeroShotClassifier
    from mergeready.transformers import MergeReadyCallback

    logging.set_verbosity_error()
    encoder = BertModel.from_pretrained(folder / "base")
    model = ZeroShotClassifier(encoder.config)
    model.bert = encoder
    generator = torch.Generator().manual_seed(0)
    model.set_head(torch.nn.functional.normalize(torch.randn(20, 384, generator=generator), dim=-1))

    class Data(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return steps * BATCH

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.randint(1000, 20000, (TOKENS,), generator=torch.Generator().manual_seed(index))
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": torch.tensor(index % 20),
            }

    spent = {"seconds": 0.0, "cpu": 0.0, "start_cpu": 0.0}

    class Timed(MergeReadyCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            cpu = time.process_time()
            super().on_train_begin(*args, **kwargs)
            spent["start_cpu"] += time.process_time() - cpu

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            super().on_step_end(*args, **kwargs)
            spent["seconds"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu

    peers = [folder / f"peer-{index}" for index in range(PEERS)]
    callback = Timed(base=folder / "base", peers=peers)
    arguments = TrainingArguments(
        output_dir=str(folder / ("watched" if watched else "plain")),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10**9,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[callback] if watched else [])
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "callback_seconds": spent["seconds"],
        "callback_cpu_seconds": spent["cpu"],
        "start_cpu_seconds": spent["start_cpu"],
        "measurements": len(callback.history.metrics),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Ratios over all runs."""
    plain = [run for run in runs if not run["watched"]]
    watched = [run for run in runs if run["watched"]]
    memory = median(r["peak_rss"] for r in watched) - median(r["peak_rss"] for r in plain)
    return {
        "callback_share_of_time": median(r["callback_seconds"] / r["seconds"] for r in watched),
        "callback_share_of_cpu": median(r["callback_cpu_seconds"] / r["cpu_seconds"] for r in watched),
        "start_cpu_seconds": median(r["start_cpu_seconds"] for r in watched),
        "wall_ratio": median(r["seconds"] for r in watched) / median(r["seconds"] for r in plain),
        "cpu_ratio": median(r["cpu_seconds"] for r in watched) / median(r["cpu_seconds"] for r in plain),
        "added_memory_over_model": memory / watched[0]["model_bytes"],
        "measurements_a_run": watched[0]["measurements"],
        "seconds_a_measurement": median(r["callback_seconds"] / r["measurements"] for r in watched),
        "seconds_a_step": median(r["seconds"] / r["steps"] for r in plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WATCHED"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(Path(options.child[0]), options.steps, options.child[1] == "1")))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        make_peers(Path(folder))
        for _ in range(options.repeats):
            for watched in (False, True):
                command = [sys.executable, "-m", "benchmarks.overhead", "--steps", str(options.steps)]
                done = subprocess.run(
                    [*command, "--child", folder, str(int(watched))],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                run = json.loads(done.stdout.strip().splitlines()[-1])
                runs.append({**run, "watched": watched, "steps": options.steps})
                print(runs[-1], flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    content = {"summary": summarise(runs), "runs": runs}
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content["summary"], indent=2))


if __name__ == "__main__":
    main()
