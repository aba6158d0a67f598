"""A recipe's optimisation, as the Trainer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mergeready.recipes import parse_recipe
from mergeready.recipes.arguments import training_arguments
from mergeready.recipes.optimisation import OptimisationSettings


def made(folder: Path, **optimisation: Any) -> TrainingArguments:
    recipe = parse_recipe(
        {
            "model": "org/base",
            "data": "org/data",
            "task": {"kind": "text-classification"},
            "optimisation": {"learning_rate": 1.0, "steps": 8, "device": "cpu", **optimisation},
            "output": str(folder / "run"),
        }
    )
    return TrainingArguments(**training_arguments(recipe))


def rates(arguments: TrainingArguments) -> list[float]:
    """The learning rate of each step."""
    trainer = Trainer(torch.nn.Linear(1, 1), arguments)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=arguments.learning_rate)
    scheduler = trainer.create_scheduler(arguments.max_steps, optimizer)
    found = []
    for _ in range(arguments.max_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", get_args(OptimisationSettings.model_fields["schedule"].annotation))
def test_every_schedule_warms_up(tmp_path: Path, schedule: str) -> None:
    found = rates(made(tmp_path, schedule=schedule, warmup=4))
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


def test_constant_is_constant(tmp_path: Path) -> None:
    assert rates(made(tmp_path, schedule="constant", warmup=2))[2:] == [1.0] * 6
    assert rates(made(tmp_path, schedule="constant")) == [1.0] * 8


def test_what_is_asked_for_arrives(tmp_path: Path) -> None:
    wanted = {"batch_size": 3, "accumulate": 5, "weight_decay": 0.25, "clip": 0.5, "seed": 7, "log_every": 9}
    arguments = made(tmp_path, save_every=6, activation_checkpointing=True, **wanted)
    names = {"batch_size": "per_device_train_batch_size", "accumulate": "gradient_accumulation_steps"}
    names |= {"clip": "max_grad_norm", "log_every": "logging_steps"}
    found = {name: getattr(arguments, names.get(name, name)) for name in wanted}
    assert found == wanted
    assert (arguments.data_seed, arguments.save_steps, arguments.max_steps) == (7, 6, 8)
    assert arguments.gradient_checkpointing
    assert not arguments.bf16
    assert arguments.output_dir == str(tmp_path / "run")
