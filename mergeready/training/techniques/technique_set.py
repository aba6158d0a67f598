from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import HistoryError, OptionError, UnsupportedError, listing
from mergeready.training.history import History
from mergeready.training.policies import Decision
from mergeready.training.techniques.hooks import StepHooks
from mergeready.training.techniques.moving import moved
from mergeready.training.techniques.registry import TechniqueLike, make_technique
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import ALONE, NEEDS_OPTIMIZER, Running, Technique, Touch
from mergeready.training.turning import turning
from mergeready.weights.guard import random_state_kept
from mergeready.weights.shards import reshard

logger = logging.getLogger("mergeready")


class TechniqueSet:
    """The techniques of one run, which a shell drives; empty, it does nothing at no cost.

    Within each optimizer step: :meth:`passes` around forward and backward of each micro-batch (or :meth:`enter` and
    :meth:`leave` where a framework has events instead of a loop), then clipping, then the optimizer's own step, whose
    hooks do the rest; :meth:`took_step` at its end.

    Where other parameters train than before, as in gradual unfreezing, techniques are bound to the run anew before
    these move, as a resumed run binds them.

    Args:
        techniques: Techniques, names, or names with settings, in the order in which they act.

    Raises:
        OptionError: If two of them cannot be used together; every such pair is named with the reason.

    Example:
        >>> TechniqueSet(["drift_penalty", "drift_penalty"])
        Traceback (most recent call last):
        mergeready.errors.OptionError: techniques that cannot be used together: drift_penalty is given twice.
    """

    def __init__(self, techniques: Sequence[TechniqueLike] = ()) -> None:
        if isinstance(techniques, Technique | str | Mapping):
            raise OptionError("`techniques` must be a list; put a single one into brackets.")
        self.techniques: list[Technique] = [
            made for made in map(make_technique, techniques) if not made.is_off
        ]
        _require_compatible(self.techniques)
        self.step = 0
        self._running: dict[str, Running] = {}
        self._hooks: StepHooks | None = None
        self._loaded: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
        self._inside: ExitStack | None = None
        self._again: list[Callable[[], object]] = []
        self._ended = False
        self._parameters: list[nn.Parameter] = []
        self._trains: list[bool] = []

    def __bool__(self) -> bool:
        return bool(self.techniques)

    def touches(self, touch: Touch) -> bool:
        """Whether one of them touches something."""
        return any(touch in technique.touches for technique in self.techniques)

    def prepare(self, model: nn.Module, *, step: int) -> None:
        """Before the run is bound to the model.

        Raises:
            UnsupportedError: Under DeepSpeed.
        """
        if self.techniques:
            _require_no_deepspeed(model)
        for technique in self.techniques:
            technique.prepare(model, step=step)

    def start(self, make_run: Callable[[], TechniqueRun]) -> None:
        """Bind to the run, and restore what was loaded.

        Raises:
            OptionError: If the run lacks what a technique needs.
            UnsupportedError: If one writes weights that the optimizer turns into others, as schedule-free ones do.
            HistoryError: If the loaded state is of other techniques.
        """
        self.finish_hooks()
        self._ended = False
        if not self.techniques:
            return
        run = make_run()
        self.step = run.step
        needing = [t for t in self.techniques if t.touches & NEEDS_OPTIMIZER]
        for technique in needing:
            touched = next(touch for touch in Touch if touch in technique.touches & NEEDS_OPTIMIZER)
            run.require_optimizer(f"{touched.value} ({technique.name})")
        _require_weights_of_its_own(self.techniques, run)
        self._parameters = list(run.live.model.parameters())
        self._begin(run)
        _warn_of_narrow_weights(self.techniques, run)
        if needing and run.optimizer is not None:
            self._hooks = StepHooks(
                run.optimizer, self._learning_rate_factor, self._after_update, run.live.model
            )

    def passes(self, *, last: bool = True, factor: Callable[[], float] = lambda: 1.0) -> Iterator[None]:
        """To be looped over around forward and backward: once, or twice where a technique wants a gradient first.

        The weights inside may be others. They are put back before the loop goes on after it, and when the body raises.

        Args:
            last: Whether an optimizer step follows; False for a micro-batch that is not the step's last.
            factor: What a gradient scaler multiplies gradients with, asked after backward.

        Raises:
            UnsupportedError: If a technique wants the gradient of the whole step first and this is only a part of it.
        """
        if not self._running:
            yield
            return
        self._follow()
        if self.wants_gradient():
            if not last:
                raise UnsupportedError(
                    f"{self._mover_name()} wants the gradient of a whole step before it moves the weights: put all "
                    "micro-batches of a step inside one `passes()`, or use larger batches and no accumulation."
                )
            with self.first_pass():
                yield
        with self.moved():
            yield
        if last:
            self.gradients_ready(factor())

    def wants_gradient(self) -> bool:
        """Whether forward and backward of the whole next step run once before :meth:`moved`."""
        return any(running.wants_gradient(self.step + 1) for running in self._running.values())

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around a pass whose gradient is only looked at. The next one sees the same random numbers and buffers."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.run.live.model.buffers()]
        with random_state_kept():
            yield
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    def moved(self) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch."""
        mover = self._mover()
        return nullcontext() if mover is None else self._moved_by(mover)

    @contextmanager
    def _moved_by(self, mover: Running) -> Iterator[None]:
        step = self.step + 1
        with moved(self.run.live.model, mover.moved(step)):
            if mover.wants_gradient(step):
                for parameter in self._stepped():
                    parameter.grad = None
            yield

    def _stepped(self) -> Iterator[nn.Parameter]:
        """What has gradients: the model, and what the optimizer steps beside it, such as parameters of a loss."""
        yield from self.run.live.model.parameters()
        for group in [] if self.run.optimizer is None else self.run.optimizer.param_groups:
            yield from group["params"]

    def enter(self, again: Callable[[], object]) -> None:
        """Before forward of each micro-batch, where a framework runs them one by one instead of in a loop of ours.

        Args:
            again: Runs forward and backward of this micro-batch. Called where a technique has looked at the gradient of
                the whole step, which it takes anew elsewhere then.
        """
        self._follow()
        if self.wants_gradient():
            if not self._again:
                self._go_into(self.first_pass())
            self._again.append(again)
        else:
            self._go_into(self.moved())

    def leave(self, *, last: bool, factor: Callable[[], float] = lambda: 1.0) -> None:
        """After backward of it; as :meth:`passes` does, whose arguments these are."""
        again = self._again
        if not again or last:
            self.abandon()
        if last:
            if again:
                with self.moved():
                    for run in again:
                        run()
            self.gradients_ready(factor())

    def between(self) -> None:
        """Before anything but the next micro-batch: put weights back where it had no backward, so nothing was left."""
        if not self._again:
            self.abandon()

    def abandon(self) -> None:
        """Put weights back, also after an exception. Does nothing where nothing was entered."""
        stack, self._inside, self._again = self._inside, None, []
        if stack is not None:
            stack.close()

    def _go_into(self, context: AbstractContextManager[None]) -> None:
        self.abandon()
        stack = ExitStack()
        stack.enter_context(context)
        self._inside = stack

    def gradients_ready(self, factor: float = 1.0) -> None:
        """After the last backward of a step, when gradients are averaged over ranks and not clipped yet.

        Args:
            factor: What a gradient scaler has multiplied the gradients with.
        """
        for running in self._running.values():
            running.add_gradients(self.step + 1, factor)
        for running in self._running.values():
            running.edit_gradients(self.step + 1)

    def took_step(self, step: int) -> None:
        """After an optimizer step."""
        self.step = step

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model holds the weights that are to be measured, evaluated and kept."""
        for running in self._running.values():
            pairs = list(running.shown())
            if pairs:
                with moved(self.run.live.model, pairs):
                    yield
                return
        yield

    def on_history(self, history: History) -> None:
        """After records were added."""
        for running in self._running.values():
            running.on_history(history)

    def decide(self, history: History) -> Decision:
        """Stop as soon as one of them wants to."""
        decisions = [running.decide(history) for running in self._running.values()]
        reasons = [decision.reason for decision in decisions if decision.stop]
        return Decision(bool(reasons), "; ".join(reasons))

    def scalars(self) -> dict[str, float]:
        """Figures for the loggers, by technique."""
        return {
            f"{name}/{key}": value
            for name, running in self._running.items()
            for key, value in running.scalars().items()
        }

    def finish(self) -> None:
        """At the end of training; a second time, nothing: what mixes weights would mix them again."""
        self.abandon()
        if self._ended:
            return
        self._ended = True
        self.finish_hooks()
        if self._running:
            reshard(self.run.live.model)
        # What gives the end its weights comes after what holds them in bounds.
        for technique in sorted(self.techniques, key=lambda technique: Touch.END in technique.touches):
            if technique.name in self._running:
                self._running[technique.name].finish()

    def finish_hooks(self) -> None:
        """Let go of the optimizer."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        """States by technique, JSON-ready."""
        return {name: running.state_dict() for name, running in self._running.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of all techniques, as ``technique/name``, on the CPU."""
        return {
            f"{name}/{key}": tensor
            for name, running in self._running.items()
            for key, tensor in running.tensors().items()
        }

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue where an earlier run was; call before :meth:`start`."""
        self._loaded = dict(state), dict(tensors)

    def _begin(self, run: TechniqueRun) -> None:
        self.run = run
        self._running = {technique.name: technique.begin(run) for technique in self.techniques}
        self._trains = self._flags()
        self._restore()

    def _follow(self) -> None:
        """See what trains by now. Asked before forward, and before the update where a loop has no ``passes``."""
        if not self._running or self._flags() == self._trains:
            return
        self.load(self.state_dict(), self.tensors())
        self.run.live.follow()
        # Never step 0, which would have techniques make at the base what they have made already.
        self._begin(replace(self.run, step=max(self.step, 1)))
        self.on_history(self.run.history())

    def _flags(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]

    def _restore(self) -> None:
        if self._loaded is None:
            return
        state, tensors = self._loaded
        self._loaded = None
        for name, running in self._running.items():
            if name not in state:
                continue  # a technique that joins now starts now
            own = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            try:
                running.load(state[name], own)
            except KeyError as error:
                raise HistoryError(
                    f"the saved state of {name} lacks {error}; it cannot be resumed."
                ) from error

    def _mover(self) -> Running | None:
        for technique in self.techniques:
            if Touch.FORWARD in technique.touches:
                return self._running.get(technique.name)
        return None

    def _mover_name(self) -> str:
        return next(t.name for t in self.techniques if Touch.FORWARD in t.touches)

    def _learning_rate_factor(self) -> float:
        self._follow()
        factor = 1.0
        for running in self._running.values():
            factor *= running.learning_rate_factor(self.step + 1)
        return factor

    def _after_update(self) -> None:
        # What is averaged comes after what holds it in bounds.
        for technique in sorted(self.techniques, key=lambda technique: Touch.EVALUATED in technique.touches):
            self._running[technique.name].after_update(self.step + 1)


def _require_weights_of_its_own(techniques: Sequence[Technique], run: TechniqueRun) -> None:
    writing = [t.name for t in techniques if t.touches & {Touch.WEIGHTS, Touch.EVALUATED, Touch.END}]
    if writing and run.optimizer is not None and turning([run.optimizer]):
        raise UnsupportedError(
            f"{type(run.optimizer).__name__} turns the weights in training into those to evaluate, of which it keeps "
            f"an average itself, and would turn what {listing(writing)} writes there as well. Take an optimizer that "
            "evaluates what it trains, or leave out these techniques."
        )


def _warn_of_narrow_weights(techniques: Sequence[Technique], run: TechniqueRun) -> None:
    writing = [t.name for t in techniques if t.touches & {Touch.FORWARD, Touch.WEIGHTS}]
    dtypes = {p.dtype for p in run.live.model.parameters() if p.requires_grad} & {
        torch.bfloat16,
        torch.float16,
    }
    if writing and dtypes:
        logger.warning(
            "%s writes into weights that train in %s: small changes vanish in rounding, and an optimizer that keeps "
            "finer copies undoes them. Train fp32 weights under autocast.",
            listing(writing),
            listing(map(str, dtypes)),
        )


def _require_compatible(techniques: Sequence[Technique]) -> None:
    problems = [problem for one, two in combinations(techniques, 2) if (problem := _conflict(one, two))]
    if problems:
        raise OptionError(f"techniques that cannot be used together: {'; '.join(problems)}.")


def _conflict(one: Technique, two: Technique) -> str | None:
    if one.name == two.name:
        return f"{one.name} is given twice"
    both = one.touches & two.touches & ALONE
    if both:
        what = " and ".join(touch.value for touch in Touch if touch in both)
        return f"{one.name} and {two.name} both change {what}"
    reason = one.conflict(two) or two.conflict(one)
    return f"{one.name} and {two.name}: {reason}" if reason else None


def _require_no_deepspeed(model: nn.Module) -> None:
    part: Any = model
    while isinstance(part, nn.Module):
        if type(part).__name__ == "DeepSpeedEngine":
            break
        part = getattr(part, "module", None)
    marked = any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in model.parameters())
    if isinstance(part, nn.Module) or marked:
        raise UnsupportedError(
            "techniques do not work under DeepSpeed, which updates weights inside its backward and overwrites what "
            "others write. Use DDP or FSDP2, or leave `techniques` out to only watch."
        )
