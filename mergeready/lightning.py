"""The Lightning shell: translates a Trainer's events for the monitor, and holds no logic of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from mergeready.errors import OptionError, UnsupportedError
from mergeready.fabric import log_images
from mergeready.training.history import History
from mergeready.training.images import run_images
from mergeready.training.monitor import Monitor, Outcome
from mergeready.training.monitored import RETENTION, direction, undefined
from mergeready.training.options import MonitorOptions, evaluating_inside
from mergeready.training.save import save_expert
from mergeready.training.scalars import PREFIX
from mergeready.training.techniques.technique_set import TechniqueSet
from mergeready.validation.share import with_sharing

FOLDER_NAME = "mergeready"


class MergeReadyCallback(Callback):  # type: ignore[misc]  # lightning is not typed
    """Watch how well the model in training merges, steer it, and stop before merging suffers.

    Add it to a Lightning ``Trainer`` that you have already. Its scalars go to all loggers, and any of them can be
    what ``ModelCheckpoint`` and ``EarlyStopping`` monitor, for example ``mergeready/merged/ties``; validation then
    starts with a probe. Checkpoints carry the history, and a resumed run continues it.

    A technique that looks at a step's gradient first has the step's batches run again through ``training_step`` and
    backward: events around backward come twice then, and what the second pass logs is dropped.

    Args:
        model: Attribute of the LightningModule that holds the model, as the base names its parameters. By default its
            only child with parameters, if there is exactly one; else the LightningModule itself.
        folder: Where ``history.jsonl``, ``picks/`` and ``summary.json`` go; ``<default_root_dir>/mergeready`` by
            default. One folder a run.
        processor: A tokenizer or processor to save with each pick.
        **options: ``base``, ``peers``, ``probe``, ``stop``, ``on_stop``, ``measure``, ``picks`` and ``techniques``,
            as :class:`~mergeready.training.monitor.Monitor` takes them. A probe needs its ``evaluate``, which is given
            the model, not the LightningModule.

    Example:
        >>> from mergeready import MergedPlateau, Probe
        >>> probe = Probe(merge="ties", evaluate=lambda model: {"accuracy": 0.5})
        >>> callback = MergeReadyCallback(model="net", probe=probe, stop=MergedPlateau(patience=3))
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> callback.history.probes
        []
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        folder: str | Path | None = None,
        processor: Any = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        self._model, self._folder, self._processor = model, folder, processor
        self._options = with_sharing(options)
        self.monitor = Monitor(**self._options)
        self._state: dict[str, Any] = {}
        self._step: int | None = None  # the last optimizer step seen; None outside training
        self._again = False  # whether a batch is being run for the second time
        self._resuming = True  # whether a checkpoint that is read is to be gone on from

    @property
    def history(self) -> History:
        """What was measured so far."""
        return self.monitor.history

    @property
    def state_key(self) -> str:
        return "mergeready"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The only event that comes after set-up and after restoring, whatever the strategy.
        model = _model_of(pl_module, self._model)
        if self.monitor.started:  # a second fit
            self._state = self.monitor.state_dict() | {"tensors": self.monitor.tensors()}
        context = trainer.precision_plugin.forward_context
        self.monitor = Monitor(**evaluating_inside(self._options, context))
        _require_events(self.monitor.techniques, pl_module)
        if trainer.global_step and self._state:
            self.monitor.load_state_dict(self._state, self._state.get("tensors"))
        total = trainer.estimated_stepping_batches
        self.monitor.start(
            model,
            Path(self._folder or Path(trainer.default_root_dir) / FOLDER_NAME),
            step=trainer.global_step,
            total_steps=int(total) if 0 < total < float("inf") else None,
            optimizers=trainer.optimizers,
            save=lambda folder: save_expert(model, folder, self._processor),
        )
        with ExitStack() as failing:
            failing.callback(self.monitor.let_go)
            self._require_direction(trainer)
            failing.pop_all()
        self._step = trainer.global_step
        self._publish(trainer, self.monitor.last_scalars())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.monitor.techniques.enter(lambda: self._run_again(trainer, pl_module, batch, batch_idx))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor.techniques and not self._again:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.monitor.techniques.leave(
                last=not trainer.fit_loop._should_accumulate(),
                factor=lambda: 1.0 if scaler is None else float(scaler.get_scale()),
            )

    def _run_again(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
        self._again = True
        try:
            with _silent(module):
                output = trainer.strategy.training_step(*arguments.values())
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is not None:
                    trainer.strategy.backward(loss / trainer.accumulate_grad_batches, None)
        finally:
            self._again = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.monitor.techniques.abandon()  # a `training_step` that returned None had no backward

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.monitor.techniques.abandon()
        self.monitor.let_go()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.monitor.techniques.between()  # as above, where no step followed
        if trainer.global_step != self._step:  # not a micro-batch of gradient accumulation
            self._step = trainer.global_step
            self._report(trainer, self.monitor.on_step(trainer.global_step))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.techniques.abandon()  # a module may end an epoch after `on_train_batch_start`

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step and any(_monitored(callback) for callback in trainer.callbacks):
            self._report(trainer, self.monitor.probe_now(trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = None
        log_images(trainer.loggers, lambda: run_images(self.history), trainer.global_step)
        self.monitor.finish()

    def state_dict(self) -> dict[str, Any]:
        if not self.monitor.started:
            return self._state
        self.monitor.on_save(complete=False)
        state, tensors = self.monitor.state_dict(), self.monitor.tensors()
        state |= {"tensors": tensors} if tensors else {}
        return state | {"history": list(state["history"])}  # it may be written while training goes on

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resuming = trainer.state.fn == TrainerFn.FITTING

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resuming:  # as where `test` reads the best checkpoint: the run stays what it was
            return
        self._state = state_dict
        self.monitor = Monitor(**self._options)  # what an earlier fit measured is not of this run

    def _report(self, trainer: Trainer, outcome: Outcome) -> None:
        if not outcome.scalars:
            return
        self._publish(trainer, outcome.scalars)
        # self.log would wait for, or miss, the next multiple of log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(dict(outcome.scalars), step=trainer.global_step)
            logger.save()
        if trainer.strategy.reduce_boolean_decision(outcome.decision.stop, all=False):
            trainer.should_stop = True

    def _publish(self, trainer: Trainer, scalars: Mapping[str, float]) -> None:
        """Let other callbacks see the scalars, now and until they are measured again."""
        known = undefined(self.history) | dict(scalars)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in known.items()})

    def _require_direction(self, trainer: Trainer) -> None:
        """Lightning takes less to be better unless told otherwise, and of NaN that nothing can be learned any more."""
        start = self.history.start
        for watching in filter(_monitored, trainer.callbacks):
            found = None if start is None else direction(watching.monitor, start)
            if found is None:
                continue
            what, more = found
            name, mode = f"{type(watching).__name__}(monitor={watching.monitor!r})", "max" if more else "min"
            if getattr(watching, "mode", mode) != mode:
                raise OptionError(
                    f"{name} watches {what}, of which {'more' if more else 'less'} is better: set mode={mode!r}."
                )
            if watching.monitor.startswith(RETENTION) and getattr(watching, "check_finite", False):
                raise OptionError(
                    f"{name} would end the run at the first probe at which the expert is no better than the base, as "
                    "there is no retention then: set check_finite=False."
                )


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Inside, what a module logs is dropped: the step has logged it already."""
    module.log = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log


def _require_events(techniques: TechniqueSet, module: LightningModule) -> None:
    if techniques and not module.automatic_optimization:
        raise UnsupportedError(
            "techniques need Lightning's automatic optimization: with manual optimization there are no events around "
            "backward. Use MergeReadyLoop of mergeready.fabric, or leave `techniques` out."
        )


def _model_of(module: nn.Module, attribute: str | None) -> nn.Module:
    if attribute is None:
        direct = next(module.parameters(recurse=False), None) is not None
        children: list[nn.Module] = [
            child for child in module.children() if next(child.parameters(), None) is not None
        ]
        return children[0] if len(children) == 1 and not direct else module
    found = getattr(module, attribute, None)
    if not isinstance(found, nn.Module):
        names = [name for name, _ in module.named_children()]
        raise OptionError(
            f"`model` is {attribute!r}, but {type(module).__name__} has only the modules {names}."
        )
    return found


def _monitored(callback: Callback) -> bool:
    """Whether a checkpoint or early-stopping callback watches one of our scalars."""
    return str(getattr(callback, "monitor", None)).startswith(PREFIX)
