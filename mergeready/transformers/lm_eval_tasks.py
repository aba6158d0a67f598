"""Evaluations by lm-eval's tasks, of a causal language model in memory."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from torch import nn
from transformers import AutoModelForCausalLM

from mergeready.errors import OptionError, UnsupportedError, listing
from mergeready.merging.evaluation import Evaluate, Values
from mergeready.transformers.folders import load_tokenizer, model_folder
from mergeready.validation.evaluation import Evaluation
from mergeready.weights.guard import random_state_kept

_SEED = 1234
"""Of few-shot examples and of answers that are drawn: the same ones whenever a model is evaluated."""

_EXACT = 1e-9
"""Difference of a task's figure from the mean of its examples' up to which it is that mean."""


def lm_eval_tasks(
    expert: str | Path,
    base: str | Path,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Tasks of EleutherAI's lm-evaluation-harness as an evaluation.

    The model is loaded once, on the accelerator if there is one; checks put the weights of base, expert and merges into
    it. No code of either folder is run. Task files are code, like any evaluation: lm-eval runs the functions that they
    name. Where a task's figure is the mean over its examples, their values are given, so that intervals are known.

    Args:
        expert: Folder or hub id of the expert.
        base: Folder or hub id of its base.
        tasks: Names of tasks or groups; the first is the expert's own, the rest are those of its peers.
        folder: A folder with task files of your own, beside those that lm-eval has.
        metric: The metric; each task's first by default, which must then be the same for all.
        limit: Examples of each task at most.
        batch_size: Prompts a forward pass.

    Raises:
        UnsupportedError: If lm-eval is not installed.
        OptionError: If a task is unknown or does not load, metrics do not agree, a number is out of range, or the model
            does not load.

    Example:
        >>> lm_eval_tasks("law", "base", [])
        Traceback (most recent call last):
            ...
        mergeready.errors.OptionError: `tasks` names no task.
    """
    if not tasks:
        raise OptionError("`tasks` names no task.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"`{name}` must be at least 1, not {value}.")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnsupportedError(
            "tasks of lm-eval need lm-eval: install it with `pip install 'mergeready[lm-eval]'`."
        ) from error
    loaded = _load_tasks(tasks, folder)
    chosen, greater_is_better = _metric_of(loaded, metric)
    model = _model(model_folder(expert, base))
    harness = HFLM(pretrained=model, tokenizer=load_tokenizer(expert, base), batch_size=batch_size)
    runs: list[Evaluate] = [partial(_run, harness, loaded[name], name, chosen, limit) for name in tasks]
    return Evaluation(
        model=model,
        own=runs[0],
        others=dict(zip(tasks[1:], runs[1:], strict=True)),
        metric=chosen,
        greater_is_better=greater_is_better,
    )


def _run(
    harness: Any, task: Mapping[str, Any], name: str, metric: str, limit: int | None, model: nn.Module
) -> Mapping[str, Values]:
    """One task's metric: of every example, where its figure is their mean."""
    from lm_eval.evaluator import evaluate

    harness._model = model
    for leaf in task["tasks"].values():
        leaf.set_fewshot_seed(seed=_SEED)  # or each evaluation would draw other examples
    with random_state_kept():
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        found = evaluate(lm=harness, task_dict=task, limit=limit, bootstrap_iters=0)
    key = next(key for key in found["results"][name] if key.partition(",")[0] == metric)
    value, kind = found["results"][name][key], key.partition(",")[2]
    examples = [
        example[metric]
        for leaf in task["tasks"]
        for example in found["samples"][leaf]
        if example["filter"] == kind
    ]
    numbers = [float(one) for one in examples if isinstance(one, int | float | np.number)]
    is_mean = len(numbers) == len(examples) and abs(float(np.mean(numbers)) - value) <= _EXACT
    return {metric: numbers if is_mean else value}


def _load_tasks(names: Sequence[str], folder: str | Path | None) -> dict[str, Mapping[str, Any]]:
    """Each task by itself, as lm-eval holds it."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise OptionError(f"{folder} is no folder. Name one that holds task files.")
    path = None if folder is None else str(folder)
    # Looking through the thousands of files that lm-eval has takes seconds.
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    unknown = [name for name in names if name not in manager.all_tasks or name in manager.all_tags]
    if unknown:
        where = "" if folder is None else f", nor does {folder}"
        raise OptionError(f"lm-eval has no tasks {listing(unknown)}{where}. `lm-eval ls tasks` lists them.")
    made = {}
    for name in names:
        try:
            made[name] = manager.load([name])
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            raise OptionError(f"the task {name} does not load: {error}") from error
        for leaf in made[name]["tasks"].values():
            if leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
    return made


def _metric_of(loaded: Mapping[str, Mapping[str, Any]], metric: str | None) -> tuple[str, bool | None]:
    """The metric of all tasks, and whether more of it is better, if they say so."""
    known = {
        name: leaf.higher_is_better() for task in loaded.values() for name, leaf in task["tasks"].items()
    }
    shown = listing(f"{name}: {', '.join(metrics)}" for name, metrics in known.items())
    chosen = metric or next(iter(next(iter(known.values()))))
    first = all(next(iter(metrics)) == chosen for metrics in known.values())
    if not all(chosen in metrics for metrics in known.values()) or not (metric or first):
        raise OptionError(
            f"the tasks do not share a metric ({shown}). Name one that all have, or fewer tasks."
        )
    directions = {metrics[chosen] for metrics in known.values()}
    if len(directions) > 1:
        raise OptionError(f"more {chosen} is better in some tasks and worse in others: {listing(known)}.")
    return chosen, directions.pop()


def _model(folder: Path) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder} does not load as a causal language model: {error}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (model if device is None else model.to(device)).eval()
