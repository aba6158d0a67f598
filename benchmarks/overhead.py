"""What monitoring costs a training run, in time and in memory: frameworks × full and LoRA × precisions × processes.

    python -m benchmarks.overhead            # what benchmarks/results/overhead.json lacks; then overhead.md
    python -m benchmarks.overhead --again    # everything anew
    python -m benchmarks.overhead --table    # only overhead.md, from what is measured

Every cell is a process of its own (two under torchrun for two ranks), on one thread, and its figures are ratios within
that process: CPU seconds inside the shell's events over CPU seconds of the rest of the run. The model is a BERT of
11 million parameters on batches of 16 × 64 tokens with four peers on disk; runs are as long as a fixed number of CPU
seconds, far shorter than trainings are, and the first measurement is always made, so shares are upper bounds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RESULT = Path(__file__).parent / "results" / "overhead.json"
PEERS, BATCH, TOKENS = 4, 16, 64
SECONDS = {"full": 48.0, "lora": 12.0}
PLAIN_STEPS = 6
PROBE_BUDGET = 0.1
SAMPLED_STEPS = 12
MANY = (1, 2, 4, 8, 16, 32)
FRAMEWORKS = ("transformers", "lightning", "accelerate")
PACES = {"cpu": "CPU", "clock": "clock"}


def cells() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measurement by name."""
    for framework, kind, precision, ranks in itertools.product(
        FRAMEWORKS, ("full", "lora"), ("fp32", "bf16"), (1, 2)
    ):
        settings = {"framework": framework, "kind": kind, "precision": precision, "ranks": ranks}
        yield f"{framework} {kind} {precision} {ranks}", settings
    for framework in FRAMEWORKS:
        yield (
            f"probe {framework}",
            {"framework": framework, "kind": "full", "precision": "fp32", "ranks": 1, "probed": True},
        )
    for kind in ("full", "lora"):
        yield f"sampled {kind}", {"sampled": kind}
    yield "peers", {"peers": MANY}


def make_world(folder: Path) -> None:
    """The base and experts near it, as full checkpoints."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=20
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    base.save_pretrained(folder / "base")
    for index in range(PEERS):
        generator = torch.Generator().manual_seed(index)
        expert = BertForSequenceClassification.from_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
        expert.save_pretrained(folder / f"peer-{index}")


def model_of(folder: Path, kind: str) -> Any:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(folder / "base")
    if kind == "full":
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value", "dense"]))


def batch_of(count: int = BATCH, seed: int = 0) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (count, TOKENS), generator=generator)
    labels = torch.randint(0, 20, (count,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Clock:
    """CPU and wall seconds inside the events of a shell."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    def watch(self, kind: Any, events: dict[str, str]) -> Any:
        """A subclass whose named methods are timed, each under a name."""
        methods = {method: self._timed(getattr(kind, method), label) for method, label in events.items()}
        return type(kind.__name__, (kind,), methods)

    def _timed(self, method: Callable[..., Any], label: str) -> Callable[..., Any]:
        entry = self.seconds.setdefault(label, {"cpu": 0.0, "wall": 0.0})

        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                entry["cpu"] += time.process_time() - cpu
                entry["wall"] += time.perf_counter() - wall

        return timed


def options_of(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Defaults, but for the peers; the probe on a schedule that wants more than its budget affords."""
    import torch

    from mergeready import Probe, Schedule

    options: dict[str, Any] = {"peers": [folder / f"peer-{index}" for index in range(PEERS)], "picks": None}
    if cell["kind"] == "full":
        options["base"] = folder / "base"
    if cell.get("probed"):
        data = batch_of(8, seed=1)

        def evaluate(model: Any) -> dict[str, Any]:
            with torch.no_grad():
                logits = model(**data).logits
            return {"accuracy": (logits.argmax(1) == data["labels"]).float()}

        schedule = Schedule(every=4, time_budget=PROBE_BUDGET)
        options["probe"] = Probe(evaluate=evaluate, scales=(0.5, 1.0), max_evaluations=3, schedule=schedule)
    return options


def seconds_a_step(folder: Path, cell: dict[str, Any]) -> float:
    """CPU seconds of a training step, to know how many make a run."""
    import torch

    model, batch = model_of(folder, cell["kind"]), batch_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    began = 0.0
    for step in range(4):
        if step == 1:
            began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=cell["precision"] == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - began) / 3


def train(folder: Path, cell: dict[str, Any], watched: bool) -> dict[str, Any]:
    """One run; what it and its monitoring took."""
    import torch

    torch.set_num_threads(1)
    # Watched or not, so that memory is that of data and not of modules.
    importlib.import_module(f"mergeready.{cell['framework']}")
    importlib.import_module("mergeready.training.figures")
    # The pace goes by CPU seconds, which are those of the clock on a machine that nobody else uses.
    monitor: Any = importlib.import_module("mergeready.training.monitor")
    monitor.time = SimpleNamespace(perf_counter=time.process_time)
    steps = PLAIN_STEPS
    if watched:
        # Given where it has to be alike on all ranks.
        steps = int(os.environ.get("STEPS") or SECONDS[cell["kind"]] / seconds_a_step(folder, cell))
    model = model_of(folder, cell["kind"])
    clock, out = Clock(), folder / f"run-{os.getpid()}"
    run = {"transformers": by_transformers, "lightning": by_lightning, "accelerate": by_accelerate}
    cpu, wall = time.process_time(), time.perf_counter()
    history = run[cell["framework"]](model, out, cell, steps, clock if watched else None, folder)
    summary = json.loads((out / "mergeready/summary.json").read_text()) if watched and first_rank() else {}
    return {
        "steps": steps,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "events": clock.seconds,
        "measurements": len(history.metrics) if history is not None else 0,
        "probes": len(history.probes) if history is not None else 0,
        "summary": summary.get("seconds", {}),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def by_transformers(
    model: Any, out: Path, cell: dict[str, Any], steps: int, clock: Clock | None, folder: Path
) -> Any:
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    from mergeready.transformers import MergeReadyCallback

    whole = batch_of()

    class Data(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return steps * BATCH * cell["ranks"]

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: values[index % BATCH] for name, values in whole.items()}

    callbacks = []
    if clock is not None:
        events = {"on_train_begin": "start", "on_step_end": "step", "on_train_end": "end"}
        callbacks = [clock.watch(MergeReadyCallback, events)(**options_of(folder, cell))]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=cell["precision"] == "bf16",
        disable_tqdm=True,
        logging_steps=10**9,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    Trainer(model, arguments, train_dataset=Data(), callbacks=callbacks).train()
    return callbacks[0].history if callbacks else None


def by_lightning(
    model: Any, out: Path, cell: dict[str, Any], steps: int, clock: Clock | None, folder: Path
) -> Any:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from mergeready.lightning import MergeReadyCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-4)

    callbacks = []
    if clock is not None:
        events = {"on_train_start": "start", "on_train_batch_end": "step", "on_train_end": "end"}
        callbacks = [clock.watch(MergeReadyCallback, events)(**options_of(folder, cell))]
    trainer = pl.Trainer(
        default_root_dir=out,
        max_steps=steps,
        accelerator="cpu",
        devices=cell["ranks"],
        strategy="ddp" if cell["ranks"] > 1 else "auto",
        precision="bf16-mixed" if cell["precision"] == "bf16" else "32-true",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Lit(), DataLoader([batch_of()] * steps, batch_size=None))
    return callbacks[0].history if callbacks else None


def by_accelerate(
    model: Any, out: Path, cell: dict[str, Any], steps: int, clock: Clock | None, folder: Path
) -> Any:
    import torch
    from accelerate import Accelerator

    from mergeready.accelerate import MergeReadyLoop

    accelerator = Accelerator(
        cpu=True, project_dir=str(out), mixed_precision="bf16" if cell["precision"] == "bf16" else "no"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    monitor = None
    if clock is not None:
        events = {"prepare": "start", "step": "step", "finish": "end"}
        monitor = clock.watch(MergeReadyLoop, events)(accelerator, **options_of(folder, cell))
        monitor.prepare(prepared, total_steps=steps)
    batch = batch_of()
    for _ in range(steps):
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step()
    if monitor is not None:
        monitor.finish()
    return monitor.history if monitor is not None else None


def against_many(folder: Path, counts: list[int]) -> dict[str, Any]:
    """A measurement against ever more peers: what it takes, and how far memory grows."""
    import torch

    from mergeready.experts import Base, LiveExpert
    from mergeready.training.history import History
    from mergeready.training.measure import measure
    from mergeready.training.peers import Peer, open_peers

    torch.set_num_threads(1)
    model = model_of(folder, "full")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    live = LiveExpert(model, Base.open(folder / "base"))
    rows: list[dict[str, float]] = []
    measure(live, [], 1, History())
    for count in counts:
        opened = open_peers(
            [Peer(folder / f"peer-{index % PEERS}", name=f"peer {index}") for index in range(count)],
            live.base,
        )
        cpu = time.process_time()
        measure(live, opened, 1, History())
        seconds = time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"peers": count, "cpu": seconds, "peak_rss": peak})
    return {"rows": rows, "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def at_every_step(folder: Path, kind: str) -> dict[str, Any]:
    """Estimates from sampled coordinates after each of a few training steps: what both take."""
    import torch

    from mergeready.experts import Base, LiveExpert
    from mergeready.training.peers import open_peers
    from mergeready.training.sampled import Sampler

    torch.set_num_threads(1)
    model, batch = model_of(folder, kind), batch_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    live = LiveExpert(model, Base.open(folder / "base") if kind == "full" else None)
    peers = open_peers([folder / f"peer-{index}" for index in range(PEERS)], live.base)
    began = time.process_time()
    sampler = Sampler(live, peers)
    times = [began, time.process_time()]
    for step in range(1, SAMPLED_STEPS + 1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time())
        sampler.measure(step)
        times.append(time.process_time())
    spent = [b - a for a, b in itertools.pairwise(times)]
    training, sampling = statistics.median(spent[1::2]), statistics.median(spent[2::2])
    return {
        "share": sampling / training,
        "sampling_seconds": sampling,
        "step_seconds": training,
        "start_seconds": spent[0],
    }


def child(folder: Path, cell: dict[str, Any], watched: bool) -> None:
    if "peers" in cell:
        found = against_many(folder, list(cell["peers"]))
    elif "sampled" in cell:
        found = at_every_step(folder, cell["sampled"])
    else:
        found = train(folder, cell, watched)
    if first_rank():
        print(json.dumps(found), flush=True)


def run_child(folder: Path, cell: dict[str, Any], watched: bool) -> dict[str, Any]:
    """The figures of one process, or of the first of two."""
    arguments = ["benchmarks.overhead", "--child", str(folder), json.dumps(cell), str(int(watched))]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.get("ranks", 1)), "-m"]
    command = [sys.executable, "-m", *(launcher if cell.get("ranks", 1) > 1 else []), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STEPS": str(cell.get("steps", ""))}
    if not cell.get("steps"):
        environment.pop("STEPS")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{cell} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[-1]))


def figures(watched: dict[str, Any]) -> dict[str, float]:
    """The ratios of a cell."""
    events = watched["events"]
    rest = watched["cpu"] - sum(event["cpu"] for event in events.values())
    return {
        "share": events["step"]["cpu"] / rest,
        "share_with_start": sum(event["cpu"] for event in events.values()) / rest,
        "start_seconds": events["start"]["cpu"],
        "measurements": watched["measurements"],
        "steps": watched["steps"],
        "train_cpu_seconds": rest,
        "paced_by": "cpu",
    }


def added_memory(folder: Path, cell: dict[str, Any]) -> dict[str, float]:
    """Peak resident memory of a short run with a measurement beyond that of the same run without."""
    short = {**cell, "steps": PLAIN_STEPS}
    watched, plain = (run_child(folder, short, watched) for watched in (True, False))
    added = watched["peak_rss"] - plain["peak_rss"]
    return {"added_bytes": added, "added_over_model": added / watched["model_bytes"]}


def measured(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """One cell's result."""
    if "peers" in cell or "sampled" in cell:
        return run_child(folder, cell, watched=True)
    if cell["ranks"] > 1:
        alone = run_child(folder, {**cell, "ranks": 1}, watched=False)
        step = alone["cpu"] / alone["steps"]
        cell = {**cell, "steps": max(int(SECONDS[cell["kind"]] / 1.4 / step), 8)}
    watched = run_child(folder, cell, watched=True)
    if cell.get("probed"):
        seconds = watched["summary"]
        return {
            "budget": PROBE_BUDGET,
            "share": seconds["probing"] / seconds["training"],
            "probes": watched["probes"],
            "probing_seconds": seconds["probing"],
            "training_seconds": seconds["training"],
        }
    return figures(watched)


def table(results: dict[str, Any], notes: list[str]) -> str:
    """The results as a page; notes are what somebody wrote into the results by hand, and are shown as such."""
    noted = [line for note in notes for line in ("", f"Noted by hand: {note}")]
    return (
        "\n".join(
            [*_measuring(results), *noted, *_probing(results), *_sampling(results), *_many_peers(results)]
        )
        + "\n"
    )


def _measuring(results: dict[str, Any]) -> list[str]:
    lines = [
        "# What monitoring costs",
        "",
        "Written by `python -m benchmarks.overhead`; its docstring says what is measured and how. One thread, CPU.",
        "",
        "## Measuring, with default settings and four peers",
        "",
        "CPU seconds in the shell's events at steps over those of the training; what starting took once, apart; peak"
        " resident memory of a process beyond that of a run without the callback that imported the same, and over the"
        " size of the model. *Pace*: what decided when to measure, CPU seconds, or the clock of a machine that"
        " others used as well. One run a cell.",
        "",
        "| framework | trained | precision | processes | share at steps | start (s) | measurements | steps"
        " | pace | added memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells():
        if cell.get("probed") or "peers" in cell or "sampled" in cell:
            continue
        if name not in results:
            lines.append(f"| {' | '.join(name.split())} | not measured | | | | | |")
            continue
        found = results[name]
        added = "not measured"
        if "added_bytes" in found:
            added = f"{found['added_bytes'] / 2**20:.0f} MiB ({found['added_over_model']:.0%})"
        lines.append(
            f"| {' | '.join(name.split())} | {found['share']:.2%} | {found['start_seconds']:.2f} | "
            f"{found['measurements']} | {found['steps']} | {PACES[found['paced_by']]} | {added} |"
        )
    return lines


def _probing(results: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Probing, held to its time budget",
        "",
        "Seconds of probing, with the references at the start, over seconds of training; the schedule asks for a probe"
        " every four steps, which is more than the budget affords.",
        "",
        "| framework | `time_budget` | share | probes |",
        "|---|---|---|---|",
    ]
    for name, found in results.items():
        if name.startswith("probe"):
            framework = name.split()[1]
            lines.append(
                f"| {framework} | {found['budget']:.0%} | {found['share']:.1%} | {found['probes']} |"
            )
    return lines


def _sampling(results: dict[str, Any]) -> list[str]:
    found = {name: results[name] for name in ("sampled full", "sampled lora") if name in results}
    if not found:
        return []
    return [
        "",
        "## Estimates at every step",
        "",
        "`sampled_every=1`, which is not the default: CPU seconds of an estimate over those of a training step, medians"
        f" of {SAMPLED_STEPS}. Its time depends on how many parameters and peers there are, not on their sizes and on"
        " batches, so it is a smaller share of larger trainings.",
        "",
        "| trained | share | estimate (ms) | step (ms) | start (s) |",
        "|---|---|---|---|---|",
        *(
            f"| {name.split()[1]} | {cell['share']:.2%} | {cell['sampling_seconds'] * 1e3:.1f} | "
            f"{cell['step_seconds'] * 1e3:.0f} | {cell['start_seconds']:.2f} |"
            for name, cell in found.items()
        ),
    ]


def _many_peers(results: dict[str, Any]) -> list[str]:
    if "peers" not in results:
        return []
    rows, size = results["peers"]["rows"], results["peers"]["model_bytes"]
    first = rows[0]["peak_rss"]
    return [
        "",
        "## Peers",
        "",
        f"One measurement of a model of {size / 2**20:.0f} MiB. Peers stay on disk: of all together some 30 MiB,"
        " pieces of one parameter, are in memory while they are compared, on the device that trains too; with more than"
        " eight peers pieces are smaller.",
        "",
        "| peers | CPU seconds | peak memory beyond that with one peer |",
        "|---|---|---|",
        *(
            f"| {row['peers']} | {row['cpu']:.2f} | {(row['peak_rss'] - first) / 2**20:.0f} MiB |"
            for row in rows
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="measure what is measured already too")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--only", default="", help="cells whose names contain this")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "CELL", "WATCHED"))
    options = parser.parse_args()
    if options.child:
        folder, cell, watched = options.child
        child(Path(folder), json.loads(cell), watched == "1")
        return
    results: dict[str, Any] = {}
    notes: list[str] = []
    if RESULT.exists() and not options.again:
        kept = json.loads(RESULT.read_text())
        results, notes = kept["cells"], kept["notes"]
    with tempfile.TemporaryDirectory() as folder:
        if not options.table:
            make_world(Path(folder))
        for name, cell in cells():
            complete = name in results and (
                "added_bytes" in results[name] or "share_with_start" not in results[name]
            )
            if options.table or complete or options.only not in name:
                continue
            if name not in results:
                results[name] = measured(Path(folder), cell)
            if "share_with_start" in results[name]:
                results[name] |= added_memory(Path(folder), cell)
            print(name, json.dumps(results[name]), flush=True)
            ordered = {name: results[name] for name, _ in cells() if name in results}
            RESULT.write_text(
                json.dumps({"notes": notes, "cells": ordered}, indent=2) + "\n", encoding="utf-8"
            )
    RESULT.with_suffix(".md").write_text(table(results, notes), encoding="utf-8")


if __name__ == "__main__":
    main()
