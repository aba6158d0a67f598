from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from mergeready.errors import OptionError, listing
from mergeready.merging.evaluation import Evaluate
from mergeready.training.history import History
from mergeready.training.images import run_images
from mergeready.training.monitor import Monitor, Outcome
from mergeready.training.monitored import direction, undefined
from mergeready.training.options import MonitorOptions
from mergeready.training.save import save_expert
from mergeready.training.scalars import PREFIX
from mergeready.training.techniques.technique import Touch
from mergeready.training.techniques.technique_set import TechniqueSet
from mergeready.transformers.difficulty import carry_ids, require_ids
from mergeready.transformers.evaluation import evaluate_with
from mergeready.transformers.find import calling_trainer, resumed_checkpoint
from mergeready.transformers.images import log_images
from mergeready.validation.share import with_sharing
from mergeready.weights.atomic import new_file

FOLDER_NAME = "mergeready"
STATE_KEY = "mergeready"
TENSORS_NAME = "mergeready_techniques.safetensors"


class MergeReadyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Watch how well the model in training merges, steer it, and stop before merging suffers.

    Add it to a ``Trainer`` that you have already. Everything it writes goes to ``<output_dir>/mergeready/``:
    ``history.jsonl``, ``picks/`` with the checkpoints worth keeping, each with fingerprint, report and card section,
    ``summary.json``; ``push_to_hub`` takes them along. Its scalars appear in the
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
        difficulty: True to track which training examples are hard; the examples get their ids by themselves.
        techniques: What changes training so that the expert merges better; objects, names, or names with settings.
            They act inside the Trainer's ``training_step``: before gradients are clipped, and of whole steps.
        share: Writes about the picks at the end, :func:`~mergeready.validation.share.share_run` by default; None for
            nothing.

    Example:
        >>> from mergeready import MergedPlateau, Probe
        >>> callback = MergeReadyCallback(probe=Probe(merge="ties"), stop=MergedPlateau(patience=3))
        >>> callback.history.probes
        []
    """

    def __init__(self, **options: Unpack[MonitorOptions]) -> None:
        self._options = with_sharing(options)
        self.monitor = Monitor(**self._options)
        self._trainer: weakref.ref[Trainer] | None = None
        self._entry: dict[str, Any] = {"attributes": {}}
        self._own_step: Any = None  # the Trainer's, while techniques stand around it
        self._state: Any = None  # the Trainer's, while it trains

    @property
    def history(self) -> History:
        """What was measured so far."""
        return self.monitor.history

    def attach(self, trainer: Trainer) -> MergeReadyCallback:
        """Add the callback to a Trainer. Same as passing it in ``callbacks``, for Trainers that hide themselves."""
        self._trainer = weakref.ref(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self.monitor.difficulty is not None:
            carry_ids(trainer)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Before the Trainer makes its data loaders.
        if self.monitor.difficulty is not None:
            carry_ids(self._look_for_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trainer = self._look_for_trainer()
        self._require_order(args, trainer)
        self.monitor = Monitor(**self._options)
        _require_own_end(args, self.monitor.techniques)
        if self.monitor.difficulty is not None:
            require_ids(trainer)
        entry = state.stateful_callbacks.setdefault(STATE_KEY, {"args": {}, "attributes": {}})
        if state.global_step and entry["attributes"]:
            self.monitor.load_state_dict(entry["attributes"], self._saved_tensors(trainer, state.global_step))
        self.monitor.start(
            model,
            _run_folder(trainer) / FOLDER_NAME,
            step=state.global_step,
            total_steps=state.max_steps,
            evaluate=self._evaluation(trainer),
            optimizers=[trainer.optimizer],
            save=lambda folder: save_expert(trainer.model, folder, trainer.processing_class),
        )
        with ExitStack() as failing:
            failing.callback(self.monitor.let_go)
            self._require_direction(args)
            failing.pop_all()
        # The Trainer writes this dictionary into each checkpoint; its history is a list that grows in place.
        self._entry = entry
        self._state = state
        entry["attributes"] = self.monitor.state_dict()
        if self.monitor.techniques:
            self._steer(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.monitor.techniques:
            state.stateful_callbacks[STATE_KEY]["attributes"]["techniques"] = (
                self.monitor.techniques.state_dict()
            )
        self._report(self.monitor.on_step(state.global_step), control)
        self._before_saving(control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before_saving(control.should_save)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if state is not self._state:
            return  # not while training: the model may be another step's, as after loading the best one
        # Whether the Trainer saves may depend on this evaluation.
        self._before_saving(True)
        if metrics is None or not _drives_best_model(args) or not state.global_step:
            return
        self._report(self.monitor.probe_now(state.global_step), control)
        # The Trainer reads the best metric from this very dictionary after the event.
        known = undefined(self.history) | dict(self.monitor.last_scalars())
        metrics |= {f"eval_{name}": value for name, value in known.items()}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        # The Trainer's last word; at on_train_end, reporters have closed.
        if (
            self.monitor.started
            and logs is not None
            and "train_runtime" in logs
            and state.is_world_process_zero
        ):
            log_images(
                self._find_trainer().callback_handler.callbacks,
                lambda: run_images(self.history),
                state.global_step,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tensors = self.monitor.tensors()
        if tensors and state.is_world_process_zero:
            with new_file(_checkpoint(self._find_trainer(), state.global_step) / TENSORS_NAME) as temporary:
                save_file(tensors, temporary)
        self.monitor.on_save()  # the checkpoint is complete only now

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._release(self._find_trainer())
        self._state = None
        self.monitor.finish()

    def _before_saving(self, due: bool) -> None:
        """Put the difficulties of this moment into what the Trainer is about to write; they do not grow in place."""
        if due and self.monitor.difficulty is not None:
            self._entry["attributes"].update(self.monitor.watch.state())

    def _release(self, trainer: Trainer) -> None:
        if self._own_step is not None:
            trainer.training_step = self._own_step
            self._own_step = None

    def _steer(self, trainer: Trainer) -> None:
        """Let techniques act around the Trainer's own step, until the end of training.

        There is no event between the last backward and clipping, nor one after an exception in forward.
        """
        self._release(trainer)  # a run that raised has not ended
        own, state = trainer.training_step, trainer.state
        techniques, accelerator = self.monitor.techniques, trainer.accelerator

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if trainer.state is not state:  # our run raised, and this is another one, perhaps without us
                techniques.finish_hooks()
                return own(*args, **kwargs)
            techniques.enter(lambda: own(*args, **kwargs))
            try:
                loss = own(*args, **kwargs)
                techniques.leave(last=accelerator.sync_gradients, factor=lambda: loss_scale(accelerator))
            except BaseException:
                techniques.abandon()
                raise
            return loss

        self._own_step = own
        trainer.training_step = training_step

    def _saved_tensors(self, trainer: Trainer, step: int) -> Mapping[str, Tensor]:
        path = (resumed_checkpoint(trainer) or _checkpoint(trainer, step)) / TENSORS_NAME
        return load_file(path) if path.is_file() else {}

    def _report(self, outcome: Outcome, control: Any) -> None:
        if outcome.scalars:
            due = control.should_log
            # Not the log of a subclass, such as TRL's, which would put the figures that it gathered beside ours, and
            # have none of these steps left for its own.
            Trainer.log(self._find_trainer(), dict(outcome.scalars))
            control.should_log = due  # logging clears the Trainer's own request of this step
        if outcome.decision.stop:
            control.should_training_stop = control.should_save = True

    def _look_for_trainer(self) -> Trainer:
        """The Trainer whose event this is, which may be another one than before; else that of ``attach``."""
        trainer = calling_trainer(self) or (None if self._trainer is None else self._trainer())
        if trainer is None:
            raise OptionError(
                "the Trainer of this callback cannot be found; call `callback.attach(trainer)`."
            )
        self._trainer = weakref.ref(trainer)
        return trainer

    def _find_trainer(self) -> Trainer:
        trainer = None if self._trainer is None else self._trainer()
        return self._look_for_trainer() if trainer is None else trainer

    def _require_order(self, args: Any, trainer: Trainer) -> None:
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, MergeReadyCallback) for callback in callbacks) > 1:
            raise OptionError(
                "`callbacks` holds several MergeReadyCallbacks, which would overwrite each other's files. "
                "One takes any number of peers and merge methods."
            )
        for callback in callbacks:
            if callback is self:
                return
            if isinstance(callback, EarlyStoppingCallback) and _drives_best_model(args):
                raise OptionError(
                    "EarlyStoppingCallback watches a mergeready metric but comes before MergeReadyCallback in "
                    "`callbacks`, so it would never see it. Put MergeReadyCallback first."
                )

    def _require_direction(self, args: Any) -> None:
        """The Trainer guesses from the name, which tells nothing of what was merged and evaluated."""
        start = self.history.start
        if start is None or not _drives_best_model(args):
            return
        found = direction(PREFIX + _best_metric(args), start)
        if found is not None and args.greater_is_better != found[1]:
            what, more = found
            raise OptionError(
                f"`{args.metric_for_best_model}` is {what} here, of which {'more' if more else 'less'} is better, but "
                f"the Trainer would keep the checkpoint with the {'most' if args.greater_is_better else 'least'}: set "
                f"greater_is_better={more} in its arguments."
            )

    def _evaluation(self, trainer: Trainer) -> Evaluate | None:
        if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
            return None
        probe = self.monitor.probe
        wanted = None if probe is None else probe.metric
        return lambda model: evaluate_with(trainer, wanted)


def _require_own_end(args: Any, techniques: TechniqueSet) -> None:
    if args.load_best_model_at_end and techniques.touches(Touch.END):
        names = listing(t.name for t in techniques.techniques if Touch.END in t.touches)
        raise OptionError(
            f"{names} sets the weights at the end of training, over the best checkpoint that `load_best_model_at_end` "
            "loads. Leave one of them out; picks keep the best step."
        )


def loss_scale(accelerator: Any) -> float:
    """What losses are multiplied with in fp16; 1 without a scaler."""
    return 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())


def _run_folder(trainer: Trainer) -> Path:
    """Where the Trainer saves checkpoints: ``output_dir``, and in a hyperparameter search one folder a trial in it."""
    if trainer.hp_search_backend is None:
        return Path(trainer.args.output_dir)
    return Path(trainer._get_output_dir(trainer._trial))


def _checkpoint(trainer: Trainer, step: int) -> Path:
    return _run_folder(trainer) / f"checkpoint-{step}"


def _drives_best_model(args: Any) -> bool:
    return bool(_best_metric(args))


def _best_metric(args: Any) -> str:
    """Which of our scalars chooses the best model, without prefix; empty where none does."""
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
