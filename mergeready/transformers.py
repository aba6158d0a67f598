"""The transformers shell: translates Trainer events for the monitor, and holds no logic of its own."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback

from mergeready.errors import OptionError
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike
from mergeready.merging.evaluation import Evaluate, Values
from mergeready.training.history import History
from mergeready.training.monitor import DEFAULT_MEASURE, Monitor, Outcome
from mergeready.training.peers import Peer
from mergeready.training.picks import Picks
from mergeready.training.policies import Policy
from mergeready.training.probe import Probe
from mergeready.training.save import save_expert
from mergeready.training.scalars import PREFIX
from mergeready.training.schedule import Schedule
from mergeready.weights.open import WeightsLike

FOLDER_NAME = "mergeready"
STATE_KEY = "mergeready"


class MergeReadyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Watch how well the model in training merges, steer it, and stop before merging suffers.

    Add it to a ``Trainer`` that you have already. Everything it writes goes to ``<output_dir>/mergeready/``:
    ``history.jsonl``, ``picks/`` with the checkpoints worth keeping, ``summary.json``. Its scalars appear in the
    Trainer's log under ``mergeready/``; any of them can be ``metric_for_best_model``, for example
    ``mergeready/merged/ties``.

    Args:
        base: The pretrained weights: a folder, hub id, state dict or module. May be left out when the run starts
            from them (they are recorded then) and for PEFT models (which carry them).
        peers: Other experts on the same base: folders, hub ids, adapters, or ``Peer`` objects that also know how to
            evaluate their task. Without peers, probes use labelled surrogates.
        probe: How to merge and evaluate during training; None to only measure the task vector. Its ``evaluate``
            defaults to the Trainer's own evaluation.
        stop: When to stop; None for never.
        on_stop: ``stop``, or ``record`` to only note when the run would have stopped.
        measure: When to measure the task vector.
        picks: Which checkpoints to keep; None for none.

    Example:
        >>> callback = MergeReadyCallback(probe=Probe(merge="ties"))
        >>> callback.history.probes
        []
    """

    def __init__(
        self,
        *,
        base: WeightsLike | Base | None = None,
        peers: Sequence[ExpertLike | Peer] = (),
        probe: Probe | None = None,
        stop: Policy | None = None,
        on_stop: Literal["stop", "record"] = "stop",
        measure: Schedule = DEFAULT_MEASURE,
        picks: Picks | None = Picks(),  # noqa: B008 - frozen
    ) -> None:
        self._settings: dict[str, Any] = {
            "base": base,
            "peers": peers,
            "probe": probe,
            "stop": stop,
            "on_stop": on_stop,
            "measure": measure,
            "picks": picks,
        }
        self.monitor = Monitor(**self._settings)
        self._trainer: weakref.ref[Trainer] | None = None

    @property
    def history(self) -> History:
        """What was measured so far."""
        return self.monitor.history

    def attach(self, trainer: Trainer) -> MergeReadyCallback:
        """Add the callback to a Trainer. Same as passing it in ``callbacks``, for Trainers that hide themselves."""
        self._trainer = weakref.ref(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trainer = self._find_trainer()
        self._require_order(args, trainer)
        self.monitor = Monitor(**self._settings)
        entry = state.stateful_callbacks.setdefault(STATE_KEY, {"args": {}, "attributes": {}})
        if state.global_step and entry["attributes"]:
            self.monitor.load_state_dict(entry["attributes"])
        self.monitor.start(
            model,
            Path(args.output_dir) / FOLDER_NAME,
            step=state.global_step,
            total_steps=state.max_steps,
            evaluate=self._evaluation(trainer),
            save=lambda folder: save_expert(trainer.model, folder, trainer.processing_class),
        )
        # The Trainer writes this dictionary into each checkpoint; its history is a list that grows in place.
        entry["attributes"] = self.monitor.state_dict()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(self.monitor.on_step(state.global_step), control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if metrics is None or not _drives_best_model(args) or not self.monitor.started:
            return
        self._report(self.monitor.probe_now(state.global_step), control)
        # The Trainer reads the best metric from this very dictionary after the event.
        metrics |= {f"eval_{name}": value for name, value in self.monitor.last_scalars().items()}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.monitor.on_save()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.monitor.finish()

    def _report(self, outcome: Outcome, control: Any) -> None:
        if outcome.scalars:
            due = control.should_log
            self._find_trainer().log(dict(outcome.scalars))
            control.should_log = due  # logging clears the Trainer's own request of this step
        if outcome.decision.stop:
            control.should_training_stop = control.should_save = True

    def _find_trainer(self) -> Trainer:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            trainer = _calling_trainer(self)
            self._trainer = weakref.ref(trainer)
        return trainer

    def _require_order(self, args: Any, trainer: Trainer) -> None:
        for callback in trainer.callback_handler.callbacks:
            if callback is self:
                return
            if isinstance(callback, EarlyStoppingCallback) and _drives_best_model(args):
                raise OptionError(
                    "EarlyStoppingCallback watches a mergeready metric but comes before MergeReadyCallback in "
                    "`callbacks`, so it would never see it. Put MergeReadyCallback first."
                )

    def _evaluation(self, trainer: Trainer) -> Evaluate | None:
        if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
            return None
        return lambda model: _evaluate_with(trainer)


def _evaluate_with(trainer: Trainer) -> Mapping[str, Values]:
    """The Trainer's evaluation without its events and logging, and one metric of it if the choice is clear."""
    # `evaluate` would fire on_evaluate again and log the merged model as if it were the expert.
    output = trainer.evaluation_loop(
        trainer.get_eval_dataloader(),
        description="Probe",
        prediction_loss_only=trainer.compute_metrics is None or None,
        metric_key_prefix="eval",
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):  # it opened a bar that only on_evaluate would close
            callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    if not output.num_samples:
        return {"loss": []}
    metrics = {name.removeprefix("eval_"): value for name, value in (output.metrics or {}).items()}
    metrics.pop("model_preparation_time", None)
    wanted = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    others = [name for name in metrics if name != "loss"]
    if wanted in metrics:
        metrics = {wanted: metrics[wanted]}
    elif len(others) <= 1:
        metrics = {name: metrics[name] for name in others or ["loss"]}
    return {name: _by_example(value, output) for name, value in metrics.items()}


def _by_example(value: float, output: Any) -> Values:
    """The accuracy of each example, where that is what the metric turns out to be; else the metric as it is."""
    predictions, labels = output.predictions, output.label_ids
    if not (isinstance(predictions, np.ndarray) and isinstance(labels, np.ndarray)):
        return value
    if predictions.ndim != 2 or labels.shape != predictions.shape[:1]:
        return value
    right = (predictions.argmax(1) == labels).astype(np.float64)
    return right if abs(float(right.mean()) - value) < 1e-9 else value


def _drives_best_model(args: Any) -> bool:
    return (args.metric_for_best_model or "").removeprefix("eval_").startswith(PREFIX)


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose event is being handled.

    Trainer hands its callbacks everything but itself, while logging and evaluation need it. It is a few frames
    up the stack, since an event is a plain chain of method calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise OptionError("the Trainer of this callback cannot be found; call `callback.attach(trainer)`.")
