"""LoRA experts of MiniLM-L3 on the text suite, trained once and kept as the folders that PEFT writes.

Two ways to adapt, each at two steps: rank 8 in every linear layer for all tasks, and rank 16 in query and value for
those of WordNet. They are for checks that must not complain about adapters as they are usually made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.study_suites import text
from benchmarks.suites.fetch import cache_folder
from benchmarks.suites.text import TEXT_SUITE
from mergeready.study.settings import AdapterSettings, Arm
from mergeready.study.suite import StudySuite
from mergeready.study.train import train_run
from mergeready.weights.atomic import new_folder

STEPS = (40, 120)
TARGETS: dict[str, tuple[int, str | list[str]]] = {
    "rank 8, all linear": (8, "all-linear"),
    "rank 16, query and value": (16, ["query", "value"]),
}
TASKS: dict[str, tuple[str, ...]] = {
    "rank 8, all linear": TEXT_SUITE,
    "rank 16, query and value": ("wordnet_noun", "wordnet_verb"),
}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """How one adapter is trained: AdamW, its rate as studies have it by default."""

    task: str
    kind: str
    seed: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32

    @property
    def folder(self) -> Path:
        """Where its checkpoints are kept."""
        spec = json.dumps(asdict(self) | {"kind": TARGETS[self.kind], "steps": STEPS}, sort_keys=True)
        return cache_folder() / "adapters" / f"{self.task}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"

    def checkpoint(self, step: int) -> Path:
        """The adapter's folder after ``step`` steps."""
        return self.folder / f"step-{step}"


@cache
def suite(backbone: str = "minilm_l3") -> StudySuite:
    """The tasks, and the encoder with frozen heads."""
    return text(seed=0, backbone=backbone, max_tokens=32)


def train_adapter(spec: AdapterSpec, tasks: Callable[[], StudySuite]) -> Path:
    """Train an adapter unless it was trained before; returns the folder of its checkpoints."""
    if spec.folder.is_dir():
        return spec.folder
    rank, targets = TARGETS[spec.kind]
    arm = Arm(
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        adapter=AdapterSettings(rank=rank, targets=targets),
    )
    torch.set_num_threads(1)
    with new_folder(spec.folder) as folder:
        found = train_run(tasks(), spec.task, arm, spec.seed, folder, steps=STEPS, total=max(STEPS))
        (folder / "spec.json").write_text(json.dumps(asdict(spec) | {"cpu_s": found["cpu_seconds"]}) + "\n")
    return spec.folder
