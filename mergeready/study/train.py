"""One training run of a study: plain PyTorch, checkpoints on the study's grid, everything drawn from the seed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergeready.merging.evaluation import call_evaluation, choose_metric, is_greater_better, take_score
from mergeready.study.checkpoints import save_checkpoint, with_adapter
from mergeready.study.given import with_given
from mergeready.study.rates import Rate
from mergeready.study.settings import Arm
from mergeready.study.steering import Steering
from mergeready.study.suite import StudySuite
from mergeready.weights.guard import random_state_kept


def train_run(
    suite: StudySuite,
    task: str,
    arm: Arm,
    seed: int,
    folder: Path,
    *,
    steps: Sequence[int],
    total: int,
    metric: str | None = None,
) -> dict[str, Any]:
    """Train one expert and keep its checkpoints.

    Args:
        suite: Model and tasks.
        task: Which task.
        arm: How to train.
        seed: Of weights that are drawn, of dropout, and of the order of examples.
        folder: Where checkpoints go; it exists and is empty.
        steps: Steps to keep. Training ends with the last of them, or earlier where the arm stops.
        total: Steps of a whole run, which the learning rate refers to.
        metric: Metric for stopping and plateaus.

    Returns:
        ``saved`` steps, ``ended`` at, ``stopped`` (why, or None), ``losses`` by step, ``evaluations`` as pairs of step
        and value, and ``cpu_seconds`` of steps alone.
    """
    data = suite.tasks[task]
    # Adapters of different tasks start alike only if asked to; dropout and order differ anyway.
    torch.manual_seed(_seed(seed, "shared" if arm.adapter is None or arm.adapter.shared_init else task))
    model = suite.model()
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if arm.adapter is not None:
        model = with_adapter(model, arm.adapter)
    torch.manual_seed(_seed(seed, task))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arm.learning_rate, weight_decay=arm.weight_decay)
    watch = _Watch(suite, task, arm, metric)
    rate = Rate(arm.schedule, optimizer, total, greater_is_better=watch.greater_is_better)
    batches = _batches(len(data.train), arm.batch_size, _seed(seed, task))
    losses, seconds, saved = [], 0.0, []
    techniques = with_given(arm.technique_list, suite, task)
    with Steering(techniques, model, base, optimizer, total) as steering:
        for step in range(1, max(steps) + 1):
            began = time.process_time()
            model.train()
            batch = data.collate([data.train[index] for index in next(batches)])
            rate.before(step)
            for _ in steering.passes():
                optimizer.zero_grad()
                with _precision(arm, parameters[0].device):
                    loss = data.loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            if arm.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, arm.clip_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
            steering.stepped(step)
            seconds += time.process_time() - began
            stopped = steering.reason
            if watch.is_due(step):
                with steering.shown():  # what is kept is what decides
                    stopped = watch.reason(model, step, rate) or stopped
            if stopped or step == total:
                steering.finish()
            if step in steps or stopped:
                with steering.shown():
                    save_checkpoint(model, folder, step)
                saved.append(step)
            if stopped:
                break
    return {
        "saved": saved,
        "ended": saved[-1],
        "stopped": stopped,
        "losses": losses,
        "evaluations": watch.values,
        "cpu_seconds": seconds,
    }


class _Watch:
    """Evaluates an expert on validation data where its arm asks for that, and says when to stop."""

    def __init__(self, suite: StudySuite, task: str, arm: Arm, metric: str | None) -> None:
        self._evaluate, self._task, self._arm = suite.tasks[task].validation, task, arm
        self._needed = arm.stop is not None or arm.schedule.kind == "plateau"
        self._metric = metric
        self.greater_is_better = True
        self.values: list[tuple[int, float]] = []
        if self._needed:
            self._metric = self._at(suite.model())[0]
            self.greater_is_better = is_greater_better(self._metric)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after a step."""
        return self._needed and step % self._arm.evaluate_every == 0

    def reason(self, model: nn.Module, step: int, rate: Rate) -> str | None:
        """Evaluate; why to stop, if so."""
        value = self._at(model)[1]
        self.values.append((step, value))
        rate.evaluated(value)
        stop = self._arm.stop
        if stop is None:
            return None
        best, best_step = -float("inf"), 0
        for known_step, known in self.values:
            signed = known if self.greater_is_better else -known
            if signed > best + stop.min_delta:
                best, best_step = signed, known_step
        waited = sum(known_step > best_step for known_step, _ in self.values)
        return f"validation was best at step {best_step}" if waited >= stop.patience else None

    def _at(self, model: nn.Module) -> tuple[str, float]:
        with random_state_kept():
            result = call_evaluation(self._evaluate, model, self._task)
        name = choose_metric(result, self._metric, self._task)
        return name, take_score(result, name, self._task).value


def _batches(examples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices batch by batch, in a new order each epoch; what is left of an epoch is left out."""
    rng = random.Random(seed)
    size = min(size, examples)
    while True:
        order = rng.sample(range(examples), examples)
        yield from (order[start : start + size] for start in range(0, examples - size + 1, size))


def _seed(seed: int, task: str) -> int:
    return random.Random(f"{seed}/{task}").getrandbits(31)


def _precision(arm: Arm, device: torch.device) -> AbstractContextManager[Any]:
    if arm.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
