"""A recipe's optimisation as arguments of a Trainer."""

from __future__ import annotations

from typing import Any

import torch

from mergeready.recipes.optimisation import OptimisationSettings
from mergeready.recipes.recipe import Recipe


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of ``TrainingArguments``, and of TRL's, which extend them."""
    wanted = recipe.optimisation
    made: dict[str, Any] = {
        "output_dir": recipe.output,
        "learning_rate": wanted.learning_rate,
        "lr_scheduler_type": _schedule(wanted),
        "warmup_steps": wanted.warmup,
        "per_device_train_batch_size": wanted.batch_size,
        "per_device_eval_batch_size": wanted.batch_size,
        "gradient_accumulation_steps": wanted.accumulate,
        "optim": wanted.optimizer,
        "weight_decay": wanted.weight_decay,
        "max_grad_norm": wanted.clip,
        "seed": wanted.seed,
        "data_seed": wanted.seed,
        "bf16": wanted.precision == "bfloat16",
        "fp16": wanted.precision == "float16",
        "use_cpu": wanted.device == "cpu",
        "dataloader_pin_memory": wanted.device != "cpu" and torch.accelerator.is_available(),
        "save_strategy": "steps",
        "save_steps": wanted.save_every or 0.1,  # below one, a share of the run
        "save_total_limit": 1,
        "logging_steps": wanted.log_every,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
    }
    if wanted.activation_checkpointing:
        made["gradient_checkpointing"] = True
    made |= {"max_steps": wanted.steps} if wanted.steps is not None else {"num_train_epochs": wanted.epochs}
    if wanted.sharding == "fsdp2":
        made |= {"fsdp": "full_shard", "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    return made


def _schedule(wanted: OptimisationSettings) -> str:
    """The name of transformers, whose constant schedule takes no notice of a warm-up."""
    return "constant_with_warmup" if wanted.schedule == "constant" and wanted.warmup else wanted.schedule
