"""What recomputing BatchNorm statistics does to a merge: for experts trained with live statistics, and with frozen.

    python -m benchmarks.batchnorm           # writes benchmarks/results/batchnorm.json

EfficientNet-Lite0 at 64 pixels, one frozen head a task. Each task's expert is trained
twice, from the same batches: with BatchNorm in evaluation mode (frozen) and in training mode (live). The scale of each
merge is searched on validation images; what is reported is test accuracy at that scale. Statistics of a merge are the
base's, the experts' average, or recomputed: on training images of all tasks, or of the task at hand. The head of a
live expert is fitted on features with the task's own statistics, which is what its training sees at first.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.suites.backbones import EFFICIENTNET_INPUT, efficientnet_lite0
from benchmarks.suites.heads import linear_probe
from benchmarks.suites.vision import load_vision_task
from mergeready import merge, recalibrate
from mergeready.merging.scale_search import search_scale

RESULT = Path(__file__).parent / "results" / "batchnorm.json"
TASKS = ("mnist", "fashion")
BATCH, LEARNING_RATE, SCALES = 32, 5e-5, (0.25, 0.5)

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task's images, normalised, and its frozen head."""

    train: Images
    validation: Images
    test: Images
    head: nn.Linear

    def accuracy(self, model: nn.Module, images: Images) -> float:
        model.eval()
        with torch.no_grad():
            found = [self.head(model.features(x)).argmax(1) for x in images[0].split(100)]
        return float((torch.cat(found) == images[1]).float().mean())


def load(name: str, base: nn.Module, live: bool, seed: int) -> Task:
    """A task; its head is fitted on features as the expert's training will first see them."""
    raw = load_vision_task(name, train=1000, validation=100, test=300, seed=seed)
    train, validation, test = (
        (EFFICIENTNET_INPUT.prepare(images), labels)
        for images, labels in (raw.train, raw.validation, raw.test)
    )
    model = copy.deepcopy(base)
    if live:
        recalibrate(model, train[0].split(2 * BATCH), force=True, forward=features)
    with torch.no_grad():
        seen = torch.cat([model.features(x) for x in train[0].split(100)])
    return Task(train, validation, test, linear_probe(seen, train[1], len(raw.label_names)))


def trained(base: nn.Module, task: Task, live: bool, steps: int, seed: int) -> nn.Module:
    """An expert; the batches depend on the seed alone."""
    model = copy.deepcopy(base).train(live)
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if not n.startswith("_fc")], lr=LEARNING_RATE
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(task.train[0]), (BATCH,), generator=generator)
        loss = functional.cross_entropy(
            task.head(model.features(task.train[0][chosen])), task.train[1][chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def mixed(tasks: Mapping[str, Task], count: int = 256) -> list[Tensor]:
    """Batches with images of every task."""
    return [
        torch.cat([task.train[0][start : start + BATCH] for task in tasks.values()])
        for start in range(0, count, BATCH)
    ]


def own(task: Task, count: int = 512) -> list[Tensor]:
    """Batches of one task."""
    return list(task.train[0][:count].split(2 * BATCH))


def features(model: nn.Module, batch: Tensor) -> Tensor:
    return model.features(batch)


Statistics = Literal["base", "average", "recalibrated on the mixture", "recalibrated on each task"]


def merged(
    base: nn.Module, experts: list[nn.Module], scale: float, kind: Statistics, tasks: Mapping[str, Task]
) -> dict[str, nn.Module]:
    """The merged model that each task is evaluated with."""
    model = merge(base, experts, scale=scale, statistics="average" if kind == "average" else "base")
    if kind == "recalibrated on the mixture":
        recalibrate(model, mixed(tasks), force=True, forward=features)
    models = dict.fromkeys(tasks, model)
    if kind == "recalibrated on each task":
        models = {name: recalibrated(model, task) for name, task in tasks.items()}
    return models


def recalibrated(model: nn.Module, task: Task) -> nn.Module:
    """A copy with the statistics of a task's training images."""
    model = copy.deepcopy(model)
    recalibrate(model, own(task), force=True, forward=features)
    return model


def best_merge(
    base: nn.Module, experts: list[nn.Module], tasks: Mapping[str, Task], kind: Statistics
) -> dict[str, Any]:
    """Test accuracies of the merge at the scale that is best on validation images."""

    def validate(scale: float) -> float:
        models = merged(base, experts, scale, kind, tasks)
        return mean({name: task.accuracy(models[name], task.validation) for name, task in tasks.items()})

    found = search_scale(validate, SCALES, max_evaluations=4)
    models = merged(base, experts, found.best, kind, tasks)
    test = {name: task.accuracy(models[name], task.test) for name, task in tasks.items()}
    return {"scale": found.best, "inside": found.inside, "test": test, "mean": mean(test)}


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def measure(base: nn.Module, live: bool, steps: int, seed: int) -> dict[str, Any]:
    tasks = {name: load(name, base, live, seed) for name in TASKS}
    experts = [trained(base, task, live, steps, seed) for task in tasks.values()]
    pairs = list(zip(tasks.items(), experts, strict=True))
    alone = {name: task.accuracy(expert, task.test) for (name, task), expert in pairs}
    again = {name: task.accuracy(recalibrated(expert, task), task.test) for (name, task), expert in pairs}
    return {
        "experts": alone | {"mean": mean(alone)},
        "experts recalibrated": again | {"mean": mean(again)},
        "merges": {kind: best_merge(base, experts, tasks, kind) for kind in get_args(Statistics)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    cpu = time.process_time()
    base = efficientnet_lite0().eval()
    content: dict[str, Any] = {
        "settings": vars(options) | {"batch": BATCH, "lr": LEARNING_RATE, "scales": SCALES, "tasks": TASKS},
        "test_images_a_task": 300,
    }
    for kind, live in (("frozen", False), ("live", True)):
        content[kind] = measure(base, live, options.steps, options.seed)
        for name, found in content[kind]["merges"].items():
            print(f"{kind:7} {name:28} {found['mean']:.3f} at scale {found['scale']}", flush=True)
    content["cpu_seconds"] = round(time.process_time() - cpu)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
