"""What a Kronecker penalty and a filter cost beside a training step, by the size of the batch, in CPU seconds.

    python -m benchmarks.penalty_cost            # writes benchmarks/results/penalty_cost.json

The studies train with 16 short texts a step, beside which the penalty is dear; its cost hardly grows with the batch.
What is done before the first step, such as adding the factors of seven peers, is measured as well.
MiniLM-L3 without embeddings and pooler, AdamW, bfloat16 as in the studies, one thread. Steps
with and without them alternate in one run.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

import mergeready
from benchmarks.merge_engine import describe
from benchmarks.suites.backbones import minilm_l3
from mergeready.training.kronecker import kronecker_factors
from mergeready.training.techniques.kronecker_filter import KroneckerFilter
from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty

RESULT = Path(__file__).parent / "results" / "penalty_cost.json"
BATCHES = ((16, 24), (16, 128), (32, 128))
STEPS, CLASSES, PEERS = 12, 8, 7
Technique = KroneckerPenalty | KroneckerFilter
NEVER = mergeready.Schedule(first=10**9)


def encoder() -> nn.Module:
    """What the studies train."""
    model: nn.Module = AutoModel.from_pretrained(minilm_l3(), local_files_only=True)
    model.embeddings.requires_grad_(False)
    model.pooler.requires_grad_(False)
    return model


def batch_of(examples: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random texts of one length."""
    ids = torch.randint(1000, 20000, (examples, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a head that is nothing but some coordinates."""
    return model(**batch).last_hidden_state.mean(1)[:, :CLASSES]  # type: ignore[no-any-return]


def starting(techniques: list[Technique]) -> float:
    """CPU seconds of what comes before the first step."""
    model = encoder()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        loop = mergeready.MergeReadyLoop(folder, techniques=techniques, measure=NEVER, picks=None)
        started = time.thread_time()
        loop.prepare(model, optimizer=optimizer)
        spent = time.thread_time() - started
        loop.finish()
    return spent


def seconds(technique: Technique, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """CPU seconds of an optimizer step without a technique, and of what it adds; it joins every second."""
    model = encoder()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(len(batch["input_ids"])) % CLASSES
    spent, after = [], []  # by step: all of it, and what comes after the backward pass, where techniques act
    with tempfile.TemporaryDirectory() as folder:
        loop = mergeready.MergeReadyLoop(folder, techniques=[technique], measure=NEVER, picks=None)
        loop.prepare(model, optimizer=optimizer)
        for _ in range(2 * STEPS):
            started = time.thread_time()
            for _ in loop.passes():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(logits(model, batch), labels)
                loss.backward()
                mark = time.thread_time()
            optimizer.step()
            after.append(time.thread_time() - mark)
            optimizer.zero_grad()
            loop.step()
            spent.append(time.thread_time() - started)
        loop.finish()
    # Not the first two, which allocate.
    return median(spent[2::2]), median(after[3::2]) - median(after[2::2])


def sentence(every: int) -> str:
    """What a penalty that joins every so many steps adds to the training time."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    shares = [
        f"{r['extra'] / r['step'] / every:.0%} with {r['examples']} texts of {r['tokens']} tokens"
        for r in rows
    ]
    return f"Every {every}th step, a Kronecker penalty adds {', '.join(shares)} a step (`benchmarks/penalty_cost.py`)."


def filter_sentence(every: int) -> str:
    """What a filter adds that comes every so many steps, and what it takes before the first."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    shares = [
        f"{r['filter'] / r['step'] / every:.1%} with {r['examples']} texts of {r['tokens']} tokens"
        for r in result["rows"]
    ]
    return (
        f"Every {every}th step, a Kronecker filter adds {', '.join(shares)} a step; before the first step, adding "
        f"the factors of {PEERS} peers and finding eigenvectors takes as long as "
        f"{result['start']['filter'] / result['rows'][0]['step']:.1f} of the shortest steps "
        f"(`benchmarks/penalty_cost.py`)."
    )


def main() -> None:
    torch.set_num_threads(1)
    factors = kronecker_factors(encoder(), [batch_of(16, 24)], forward=logits, label="peer")
    peers = [copy.deepcopy(factors) for _ in range(PEERS)]
    penalty = KroneckerPenalty(factors=peers, strength=1.0, every=2)
    sieve = KroneckerFilter(factors=peers, strength=1.0, every=2)
    rows: list[dict[str, Any]] = []
    for examples, tokens in BATCHES:
        batch = batch_of(examples, tokens)
        (step, extra), (other, filtering) = seconds(penalty, batch), seconds(sieve, batch)
        found = {"step": (step + other) / 2, "extra": extra, "filter": filtering}
        rows.append({"examples": examples, "tokens": tokens} | {k: round(v, 4) for k, v in found.items()})
        print(rows[-1], flush=True)
    plain = min(starting([]) for _ in range(3))
    start = {
        name: round(min(starting([technique]) for _ in range(3)) - plain, 4)
        for name, technique in {"penalty": penalty, "filter": sieve}.items()
    }
    result = {"machine": describe(), "rows": rows, "start": start}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
