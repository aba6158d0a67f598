"""A study that takes seconds: one linear encoder, three tasks that read its output through fixed heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergeready.study.suite import StudySuite, StudyTask

TASKS = ("red", "green", "blue")
YAML = """
name: toy
suite: {target: "%s:suite", arguments: {examples: 40}}
seeds: [0, 1]
steps: [2, 4, 8]
picks: [best_validation]
train: {learning_rate: 0.05, batch_size: 8}
arms:
  plain: {}
  cosine: {schedule: {kind: cosine, warmup_steps: 2}}
methods:
  average: {tune: false}
  task_arithmetic: {scales: [0.5, 0.8]}
max_evaluations: 4
"""


def suite(seed: int, examples: int = 40) -> StudySuite:
    generator = torch.Generator().manual_seed(seed)
    tasks = {}
    for index, name in enumerate(TASKS):
        head = torch.randn(3, 4, generator=torch.Generator().manual_seed(100 + index))
        inputs = torch.randn(3 * examples, 6, generator=generator)
        rule = torch.randn(6, 3, generator=torch.Generator().manual_seed(200 + index))
        rows = list(zip(inputs, (inputs @ rule).argmax(dim=1), strict=True))
        tasks[name] = StudyTask(
            train=rows[:examples],
            collate=stack,
            loss=Loss(head),
            validation=Accuracy(head, rows[examples : 2 * examples]),
            test=Accuracy(head, rows[2 * examples :]),
            extra={"on training examples": Accuracy(head, rows[:examples])},
        )
    return StudySuite(model=model, tasks=tasks)


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def stack(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Loss:
    def __init__(self, head: Tensor) -> None:
        self.head = head

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]) @ self.head.T, batch[1])


class Accuracy:
    def __init__(self, head: Tensor, rows: list[tuple[Tensor, Tensor]]) -> None:
        self.head, (self.inputs, self.labels) = head, stack(rows)

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        return {"accuracy": ((module(self.inputs) @ self.head.T).argmax(dim=1) == self.labels).float()}
