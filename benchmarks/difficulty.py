"""Which examples a run calls hard, where a fifth of the labels is known to be wrong; and what a merge forgets of them.

    python -m benchmarks.difficulty           # writes benchmarks/results/difficulty.json, about 2 CPU-minutes

MiniLM-L6 on glosses of nouns (25 classes, frozen zero-shot head), trained for some epochs on examples of which a fifth
are mislabelled. AUC is the probability that a mislabelled example is called harder than another, by what the run's own
forward passes said and by a model that was not trained on it (two folds). Then the run is merged with one peer, by task
arithmetic at one fixed scale, and both are asked for the labels they were trained on. One seed, one task: an
illustration of the instrument, not a result about merging.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.suites.heads import LOGIT_SCALE, pooled, zero_shot_logits
from benchmarks.suites.text import load_text_task
from benchmarks.text_experts import ExpertSpec, encode, encoder, head
from mergeready import (
    DifficultyTracker,
    MergedInPlace,
    accuracy_by_subset,
    auc_of_noise,
    cross_fitted_difficulty,
    easy_and_hard,
    forgetting_by_difficulty,
)
from mergeready.training.difficulty.noise import noisy_labels

RESULT = Path(__file__).parent / "results" / "difficulty.json"
TASK, PEER, PEER_STEP = "wordnet_noun", "wordnet_verb", 64
EXAMPLES, SHARE, EPOCHS, FOLD_EPOCHS, BATCH, TOKENS, RATE, SCALE, SEED = 480, 0.2, 6, 3, 32, 32, 1e-4, 0.5, 0


class Data:
    """Training texts with noise."""

    def __init__(self) -> None:
        task = load_text_task(TASK, train=EXAMPLES, seed=SEED)
        self.texts, self.clean = task.train
        self.labels, self.wrong = noisy_labels(self.clean, len(task.label_texts), SHARE, SEED)
        self.head = head(TASK)

    def logits(self, model: nn.Module, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels, and what the head was given."""
        features = pooled(model, encode([self.texts[i] for i in positions], TOKENS))  # type: ignore[arg-type]
        labels = torch.from_numpy(self.labels[list(positions)])
        return zero_shot_logits(features, self.head), labels, LOGIT_SCALE * features

    @torch.no_grad()
    def all_logits(self, model: nn.Module, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        model.eval()
        parts = [self.logits(model, positions[i : i + 64])[:2] for i in range(0, len(positions), 64)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


def train(
    data: Data, positions: Sequence[int], epochs: int, tracker: DifficultyTracker | None = None
) -> nn.Module:
    """AdamW at a constant rate after ten steps of warm-up."""
    torch.manual_seed(SEED)
    rng, model, step = random.Random(SEED), encoder().train(), 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(epochs):
        order = rng.sample(list(positions), len(positions))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            step += 1
            batch = order[start : start + BATCH]
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, step / 10)
            logits, labels, inputs = data.logits(model, batch)
            if tracker is not None:
                tracker.observe(torch.tensor(batch), logits, labels, inputs=inputs, bias=False, step=step)
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    return model


def by_epoch(values: np.ndarray) -> list[float]:
    return [round(float(part.mean()), 4) for part in np.array_split(values, EPOCHS)]


def main() -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    data, tracker = Data(), DifficultyTracker()
    model = train(data, range(EXAMPLES), EPOCHS, tracker)
    table, steps = tracker.table(), tracker.steps()
    fitted = cross_fitted_difficulty(
        EXAMPLES,
        lambda positions: train(data, positions, FOLD_EPOCHS),
        data.all_logits,
        strata=data.labels.tolist(),
    )
    ids = np.arange(EXAMPLES)
    measures = {
        "loss, mean of all passes": table.column("loss", ids),
        "loss, last pass": table.column("loss_last", ids),
        "EL2N, mean of all passes": table.column("el2n", ids),
        "EL2N, last pass within 32 steps": table.column("el2n_early", ids),
        "1 - confidence, mean": 1 - table.column("confidence", ids),
        "forgetting events": table.column("forgotten", ids),
        "loss, out of fold": fitted.loss,
        "EL2N, out of fold": fitted.el2n,
    }
    auc = {name: round(auc_of_noise(values, data.wrong), 4) for name, values in measures.items()}
    answers: dict[str, np.ndarray] = {}
    base = encoder().state_dict()
    logits, labels = data.all_logits(model, range(EXAMPLES))
    answers["expert"] = (logits.argmax(1) == labels).numpy()
    peer = {**base, **load_file(ExpertSpec(task=PEER).checkpoint(PEER_STEP))}
    with MergedInPlace(model, base, [peer], scale=SCALE):
        logits, _ = data.all_logits(model, range(EXAMPLES))
    answers["merged"] = (logits.argmax(1) == labels).numpy()
    clean = np.setdiff1d(ids, data.wrong)
    groups = easy_and_hard(fitted.loss[clean])
    subsets: dict[str, Any] = {
        "easy, clean": clean[groups["easy"]],
        "hard, clean": clean[groups["hard"]],
        "mislabelled": data.wrong,
    }
    result = {
        "task": TASK,
        "peer": f"{PEER} at step {PEER_STEP}",
        "examples": EXAMPLES,
        "mislabelled": len(data.wrong),
        "steps": len(steps["step"]),
        "scale": SCALE,
        "seed": SEED,
        "auc": auc,
        "share_of_hardest_tenth_by_epoch": {
            "loss": by_epoch(steps["loss_share"]),
            "last-layer gradient": by_epoch(steps["gradient_share"]),
        },
        "accuracy_on_training_labels": {
            name: {subset: asdict(value) for subset, value in accuracy_by_subset(right, subsets).items()}
            for name, right in answers.items()
        },
        "forgotten_by_decile_of_out_of_fold_loss": [
            asdict(group)
            for group in forgetting_by_difficulty(answers["expert"], answers["merged"], fitted.loss)
        ],
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["auc"], indent=2))


if __name__ == "__main__":
    main()
