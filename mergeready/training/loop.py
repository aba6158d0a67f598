from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from numpy import uint8
from numpy.typing import NDArray
from torch import nn

from mergeready.errors import HistoryError, OptionError
from mergeready.training.difficulty.tracker import DifficultyTracker
from mergeready.training.history import History
from mergeready.training.images import run_images
from mergeready.training.monitor import Monitor
from mergeready.training.options import MonitorOptions, with_defaults
from mergeready.training.save import save_expert


class MergeReadyLoop:
    """Watch how well the model of a training loop of your own merges, steer it, and stop before merging suffers.

    Call :meth:`prepare` before the first step, :meth:`step` after every optimizer step, :meth:`finish` at the end. With
    techniques, forward and backward stand inside ``for _ in monitor.passes()``, and ``prepare`` gets the optimizer.
    To resume, save :meth:`state_dict` with your checkpoint and give it to :meth:`load_state_dict` before
    :meth:`prepare`.

    Args:
        folder: Where ``history.jsonl``, ``picks/`` and ``summary.json`` go; one folder a run.
        **options: ``base``, ``peers``, ``probe``, ``stop``, ``on_stop``, ``measure``, ``picks`` and
            ``techniques``, as :class:`~mergeready.training.monitor.Monitor` takes them. A probe needs its ``evaluate``.
            With ``share=mergeready.share_run``, each pick gets fingerprint, report and card at the end.

    Attributes:
        steps: Optimizer steps taken so far.
        should_stop: Whether ``stop`` has said so.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from mergeready import NormBudget, Schedule
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = MergeReadyLoop(mkdtemp(), measure=Schedule(every=2), stop=NormBudget(max_norm=0.5))
        >>> monitor.prepare(model, total_steps=100)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 3)).backward()
        ...     optimizer.step()
        ...     logged = monitor.step()
        ...     if monitor.should_stop:
        ...         break
        >>> summary = monitor.finish()
        >>> monitor.steps, summary["stopped"][0]["reason"]
        (4, '‖τ‖ = 0.8 is beyond 0.5')

        With techniques:

        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = MergeReadyLoop(mkdtemp(), techniques=["drift_penalty"])
        >>> monitor.prepare(model, optimizer=optimizer)
        >>> for micro_batches in [[torch.ones(1, 3), torch.zeros(1, 3)]] * 5:  # one entry an optimizer step
        ...     for _ in monitor.passes():
        ...         for batch in micro_batches:
        ...             (model(batch).mean() / 2).backward()
        ...     optimizer.step()  # clip before it, if you do
        ...     optimizer.zero_grad()
        ...     logged = monitor.step()
        >>> monitor.steps
        5
    """

    def __init__(self, folder: str | Path, **options: Unpack[MonitorOptions]) -> None:
        self.folder = Path(folder)
        self.monitor = Monitor(**with_defaults(options))
        self.steps = 0
        self.should_stop = False
        self._state: Mapping[str, Any] | None = None
        self._scaler: Any = None

    @property
    def history(self) -> History:
        """What was measured so far."""
        return self.monitor.history

    @property
    def difficulty(self) -> DifficultyTracker | None:
        """What is known of the training's examples; None where difficulty is not tracked."""
        return self.monitor.difficulty

    def prepare(
        self,
        model: nn.Module,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        processor: Any = None,
        optimizer: Any = None,
        scaler: Any = None,
    ) -> None:
        """Bind to a model that is ready to train: wrapped, and on resume loaded. Check everything, measure references.

        Args:
            model: The model.
            step: Optimizer steps taken already; known without this if the state was loaded.
            total_steps: Optimizer steps that the run will take in all, so that the last one is measured.
            processor: A tokenizer or processor to save with each pick.
            optimizer: The optimizer, or several in a list; some techniques need it. Where it trains 16-bit parameters
                and keeps finer copies of them, these are measured.
            scaler: The ``torch.amp.GradScaler``, if the loop scales its loss.

        Raises:
            OptionError: If ``step`` differs from the step of the loaded state.
            MergeReadyError: If base, peers or evaluations are not usable. Nothing was changed.
        """
        if self._state is not None:
            saved = self._state.get("step")
            if not isinstance(saved, int):
                raise HistoryError("the loaded state does not say after which step it was saved.")
            if step not in (None, saved):
                raise OptionError(f"`step` is {step}, but the loaded state was saved after step {saved}.")
            self.monitor.load_state_dict(self._state, self._state.get("tensors"))
            step = saved
        self.steps = step or 0
        self._scaler = scaler
        self.monitor.start(
            model,
            self.folder,
            step=self.steps,
            total_steps=total_steps,
            optimizers=_as_list(optimizer),
            save=lambda folder: save_expert(model, folder, processor),
        )

    def passes(self, *, last: bool = True) -> Iterator[None]:
        """Around forward and backward of one optimizer step, all its micro-batches: ``for _ in monitor.passes(): …``.

        The body runs once, or twice under a technique that looks at the gradient first. Inside, a technique may have
        replaced the weights; they are back, bit for bit, when the loop is left, also by an exception. Clip and update
        after it.

        Args:
            last: False for a micro-batch that is not the last of its step, where each has ``passes`` of its own.
        """
        self._require_prepared()
        yield from self.monitor.techniques.passes(last=last, factor=self._loss_scale)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def step(self) -> Mapping[str, float]:
        """After an optimizer step: measure and probe if they are due, then decide.

        Returns:
            What was measured at this step, named and ready for a logger; empty at most steps.

        Raises:
            MergeReadyError: If the model's values or an evaluation are not usable. The model is as it was.
        """
        self._require_prepared()
        self.steps += 1
        outcome = self.monitor.on_step(self.steps)
        if outcome.scalars:
            self._log(outcome.scalars)
            self.should_stop = self._any_rank(outcome.decision.stop) or self.should_stop
        return outcome.scalars

    def images(self) -> dict[str, NDArray[uint8]]:
        """The run's composability curves and its growth by layer, as RGB arrays by name."""
        return run_images(self.history)

    def finish(self) -> dict[str, Any]:
        """At the end: log the images, remove what is not picked, write ``summary.json`` and return its content."""
        self._require_prepared()
        self._log_images()
        return self.monitor.finish()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, to be saved with each checkpoint.

        Numbers and text; tensors only under ``tensors``, which is there where a technique keeps some.
        """
        self._require_prepared()
        self.monitor.on_save(complete=False)
        state = self.monitor.state_dict()
        tensors = self.monitor.tensors()
        found = {"step": self.steps, **state, "history": list(state["history"])}
        return found | ({"tensors": tensors} if tensors else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an earlier run; call before :meth:`prepare`.

        Raises:
            OptionError: If the model was prepared already.
        """
        if self.monitor.started:
            raise OptionError(
                "load the monitor's state before `prepare(model)`, which measures the loaded weights."
            )
        self._state = dict(state)

    def _require_prepared(self) -> None:
        if not self.monitor.started:
            raise OptionError("call the monitor's `prepare(model)` first.")

    def _any_rank(self, stop: bool) -> bool:
        """Whether any process decided to stop. Here they all see the same history."""
        return stop

    def _log(self, scalars: Mapping[str, float]) -> None:
        """Send scalars to the framework's loggers. Here the caller has them from :meth:`step`."""

    def _log_images(self) -> None:
        """Send the images to the framework's loggers that take images. Here the caller has :meth:`images`."""


def _as_list(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
