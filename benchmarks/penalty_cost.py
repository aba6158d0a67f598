"""What one gradient of a Kronecker penalty costs beside a training step, by the size of the batch, in CPU seconds.

    python -m benchmarks.penalty_cost            # writes benchmarks/results/penalty_cost.json

The studies train with 16 short texts a step, beside which the penalty is dear; its cost hardly grows with the batch.
MiniLM-L3 without embeddings and pooler, AdamW, bfloat16 as in the studies, one thread. Steps
with and without it alternate in one run.
"""

from __future__ import annotations

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
from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty

RESULT = Path(__file__).parent / "results" / "penalty_cost.json"
BATCHES = ((16, 24), (16, 128), (32, 128))
STEPS, CLASSES = 20, 8
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


def seconds(penalty: KroneckerPenalty, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """CPU seconds of an optimizer step without the penalty, and of what the penalty adds; it joins every second."""
    model = encoder()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(len(batch["input_ids"])) % CLASSES
    spent = []
    with tempfile.TemporaryDirectory() as folder:
        loop = mergeready.MergeReadyLoop(folder, techniques=[penalty], measure=NEVER, picks=None)
        loop.prepare(model, optimizer=optimizer)
        for _ in range(2 * STEPS):
            started = time.thread_time()
            for _ in loop.passes():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(logits(model, batch), labels)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loop.step()
            spent.append(time.thread_time() - started)
        loop.finish()
    plain = median(spent[2::2])  # not the first two, which allocate
    return plain, median(spent[3::2]) - plain


def sentence(every: int) -> str:
    """What a penalty that joins every so many steps adds to the training time."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    shares = [
        f"{r['extra'] / r['step'] / every:.0%} with {r['examples']} texts of {r['tokens']} tokens"
        for r in rows
    ]
    return f"Every {every}th step, a Kronecker penalty adds {', '.join(shares)} a step (`benchmarks/penalty_cost.py`)."


def main() -> None:
    torch.set_num_threads(1)
    factors = kronecker_factors(encoder(), [batch_of(16, 24)], forward=logits, label="peer")
    penalty = KroneckerPenalty(factors=[factors], strength=1.0, every=2)
    rows: list[dict[str, Any]] = []
    for examples, tokens in BATCHES:
        step, extra = seconds(penalty, batch_of(examples, tokens))
        rows.append(
            {"examples": examples, "tokens": tokens, "step": round(step, 4), "extra": round(extra, 4)}
        )
        print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
