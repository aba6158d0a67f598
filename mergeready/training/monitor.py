from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mergeready.errors import HistoryError, MergeReadyError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.experts.live import LiveExpert
from mergeready.merging.evaluation import Evaluate, Score
from mergeready.training.agreement import agreed
from mergeready.training.base_of_run import base_of_run
from mergeready.training.difficulty.tracker import Difficulty, DifficultyTracker
from mergeready.training.difficulty.watch import DifficultyWatch
from mergeready.training.finish import FinishedRun, Share
from mergeready.training.history import History, HistoryFile
from mergeready.training.masters import Masters, MastersLike
from mergeready.training.measure import measure
from mergeready.training.peers import Peer, PeerLike
from mergeready.training.peers_of_run import peers_of_run
from mergeready.training.picks import Picks, PickStore, Save
from mergeready.training.policies import Decision, Policy, needs_probes
from mergeready.training.probe import Probe, Prober
from mergeready.training.records import DecisionRecord, Record
from mergeready.training.references import measure_references
from mergeready.training.rounding_warning import warn_of_rounding
from mergeready.training.sampled import Sampler
from mergeready.training.scalars import PREFIX, scalars
from mergeready.training.schedule import Pacer, Schedule
from mergeready.training.start_record import records_of_start, start_record
from mergeready.training.summary import write_summary
from mergeready.training.techniques.hooks import take_off, unwrapped
from mergeready.training.techniques.registry import TechniqueLike
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique_set import TechniqueSet
from mergeready.training.turning import turned, turning
from mergeready.weights.module import unwrap
from mergeready.weights.open import WeightsLike
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import require_readable

logger = logging.getLogger("mergeready")

DEFAULT_MEASURE = Schedule(every=100, time_budget=0.008)
STATE_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """What a step brought: scalars for the framework's loggers, and whether to stop."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    decision: Decision = field(default_factory=lambda: Decision(False, ""))


class Monitor:
    """The heart of a run: measures, probes, records, decides and picks, whatever the training framework.

    A shell makes one, calls :meth:`start` when model and optimizer are ready, then :meth:`on_step` after every
    optimizer step, :meth:`on_save` after the framework saved a checkpoint, and :meth:`finish` at the end.

    In a run of several processes every rank makes the same calls. All see the same history and decide alike; the first
    one writes files. Evaluations run on every rank and have to return the same there; see
    :func:`~mergeready.training.agreement.agreed`.

    Args:
        base: The weights that training started from. None where that can be found out; see ``base_of_run``.
        peers: Other experts on the same base, as they are or as ``Peer`` with an evaluation of their task; or their
            fingerprints, against which the run is measured by estimates and with which probes do not merge.
        probe: How to probe; None to only measure.
        stop: When to stop; None for never.
        on_stop: ``stop`` asks the framework to stop; ``record`` only notes when it would have.
        measure: When to measure the task vector.
        sampled_every: Steps between estimates of norm, cosine and sign conflict from sampled coordinates, such as 1;
            None for none. They have standard errors, cost next to nothing, and no policy looks at them. With 16-bit
            weights whose fp32 copies an optimizer keeps, finding these takes a pass over the weights each time.
        picks: Which checkpoints to keep; None for none.
        masters: fp32 copies of 16-bit parameters, where the optimizer does not show them: a mapping from parameter
            name, or a function that gives one. See :class:`~mergeready.training.masters.Masters`.
        difficulty: How to track which examples are hard, True for the defaults; None for not at all. The training's
            examples need ids: see :func:`~mergeready.training.difficulty.ids.with_example_ids`.
        techniques: What changes training so that the expert merges better; objects, names, or names with settings.
        share: Writes about the final picks at the end: fingerprint, report and card, as
            :func:`~mergeready.validation.share.share_run` does; None for nothing.
    """

    def __init__(
        self,
        *,
        base: WeightsLike | Base | None = None,
        peers: Sequence[PeerLike] = (),
        probe: Probe | None = None,
        stop: Policy | None = None,
        on_stop: Literal["stop", "record"] = "stop",
        measure: Schedule = DEFAULT_MEASURE,
        sampled_every: int | None = None,
        picks: Picks | None = None,
        masters: MastersLike | None = None,
        difficulty: Difficulty | bool | None = None,
        techniques: Sequence[TechniqueLike] = (),
        share: Share | None = None,
    ) -> None:
        if isinstance(peers, str | Path | Peer | Fingerprint | Mapping | nn.Module):
            raise OptionError("`peers` must be a sequence of experts; put a single one into a list.")
        if on_stop not in ("stop", "record"):
            raise OptionError(f"`on_stop` must be 'stop' or 'record', not {on_stop!r}.")
        if not isinstance(measure, Schedule):
            raise OptionError(
                f"`measure` must be a Schedule, such as Schedule(every=100), not {measure!r}. Measuring cannot be "
                "switched off; Schedule(first=…) puts it off."
            )
        if sampled_every is not None and sampled_every < 1:
            raise OptionError(f"`sampled_every` must be at least 1, or None, not {sampled_every}.")
        self.base, self.probe, self.stop, self.on_stop, self.picks = base, probe, stop, on_stop, picks
        self._given_peers = list(peers)
        self._given_masters = masters
        self.watch = DifficultyWatch(difficulty)
        self._share = share
        self._measure_schedule, self._sampled_every = measure, sampled_every
        self.techniques = TechniqueSet(techniques)
        self.history: History = History()
        self.started = False
        self._restored: History | None = None
        self._figures: dict[str, float] = {}
        self._saving = False

    def start(
        self,
        model: nn.Module,
        folder: Path,
        *,
        step: int = 0,
        total_steps: int | None = None,
        evaluate: Evaluate | None = None,
        metric: str | None = None,
        save: Save | None = None,
        optimizers: Iterable[Any] = (),
    ) -> None:
        """Bind to a model that is ready to train, check everything, and take the reference measurements.

        Args:
            model: The model, after the framework prepared it and, on resume, loaded its weights.
            folder: Where history and picks go.
            step: Optimizer steps taken already.
            total_steps: Optimizer steps that the run will take in all, if known.
            evaluate: The framework's own evaluation of the run's task, for probes without one.
            metric: The framework's own choice of metric, for probes without one.
            save: Writes the model of the moment as an expert; needed for picks.
            optimizers: The training's optimizers, or frameworks' wrappers of them; some techniques need one. Finer
                copies of 16-bit parameters are looked for in them, and schedule-free ones are asked for the weights
                to evaluate.

        Raises:
            MergeReadyError: If base, peers or evaluations are not usable. Nothing was written, and nothing changed but
                what techniques initialise.
            UnsupportedError: If the model is sharded in a way that cannot be read, as by FSDP1 and ZeRO-3.
        """
        require_readable(model)
        self.ranks = Ranks.world()
        self.folder, self._step = Path(folder), step
        if self.probe is None and needs_probes(self.stop) and self.ranks.is_first:
            logger.warning(
                "`stop` looks at probes, and there are none: it will never stop. Give the run a `probe`."
            )
        given = list(optimizers)
        self._turning = turning(given)
        for optimizer in given:
            take_off(optimizer, unwrap(model))
        self.techniques.prepare(model, step=step)
        with ExitStack() as failing:
            failing.callback(self.let_go)
            self._bind(model, step)
            self.watch.start(model, self.ranks, step)
            self._masters = Masters(model, given, self._given_masters)
            self._refine()
            self.techniques.start(lambda: self._technique_run(step, total_steps, given))
            before = time.perf_counter()
            with turned(self._turning):
                self._prober = self._make_prober(evaluate, metric)
            self._reference_seconds = self._since(before)
            self._measuring = Pacer(self._measure_schedule, total_steps, step)
            self._probing = self._make_probe_pacer(total_steps, step)
            self._store = self._make_store(save)
            self._open_history(step)
            self._sampler = self._make_sampler()
            self.techniques.on_history(self.history)
            failing.pop_all()
        # Training time begins here; the references count as spent, and what is spent is taken off again.
        self._began = time.perf_counter() - self._reference_seconds
        self.started = True

    @property
    def difficulty(self) -> DifficultyTracker | None:
        """What is known of the training's examples; None where difficulty is not tracked."""
        return self.watch.tracker

    def on_step(self, step: int) -> Outcome:
        """After an optimizer step: measure and probe if the schedules say so, then decide.

        Args:
            step: Optimizer steps taken so far, counted from 1. Where several are taken at once, as by several
                optimizers, what was due at one of them is done after the last.

        Raises:
            MergeReadyError: If the model's values or an evaluation are not usable. The model is as it was.
        """
        after, self._step = self._step, step
        self.watch.took_step(step)
        self.techniques.took_step(step)
        if self._saving:
            self.on_save()
        pacers = [pacer for pacer in (self._measuring, self._probing) if pacer is not None]
        looking = any(pacer.on_schedule(step, after) for pacer in pacers)
        every = self._sampled_every
        sampling = every is not None and step // every > min(after, step - 1) // every
        if not looking and not sampling:
            return Outcome()
        with self._shown():
            sampled = self._look_at_samples(self._sampler, step) if self._sampler and sampling else {}
            seconds = self.ranks.same(self._train_seconds()) if looking else 0.0
            found = self._look(step, seconds, after) if looking else Outcome()
        return replace(found, scalars={**sampled, **found.scalars})

    def _look_at_samples(self, sampler: Sampler, step: int) -> Mapping[str, float]:
        self._refine()
        record = sampler.measure(step)
        self._append(record)
        return scalars(record)

    def _look(self, step: int, seconds: float, after: int) -> Outcome:
        records: list[Record] = []
        if self._measuring.due(step, seconds, after):
            began = time.perf_counter()
            self._refine()
            record = measure(self.live, self.peers, step, self.history, self.sketched)
            warn_of_rounding(record, self.history)
            records.append(record)
            self._measuring.took(self._since(began))
        if self._probing is not None and self._probing.due(step, seconds, after):
            records.append(self._run_probe(step))
        return self._note(step, records)

    def probe_now(self, step: int, score: Score | None = None) -> Outcome:
        """Probe outside the schedule, unless this step was probed already.

        Args:
            step: Optimizer steps taken so far.
            score: The own task's score, if the framework has just evaluated it.
        """
        probes = self.history.probes
        if self._prober is None or (probes and probes[-1].step == step):
            return Outcome()
        with self._shown():
            return self._note(step, [self._run_probe(step, score)])

    def last_scalars(self) -> Mapping[str, float]:
        """The scalars of the newest measurement, estimate and probe, and what techniques said last."""
        kinds = (self.history.metrics, self.history.sampled, self.history.probes)
        newest = [scalars(records[-1]) for records in kinds if records]
        return {name: value for found in newest for name, value in found.items()} | self._figures

    def on_save(self, *, complete: bool = True) -> None:
        """After the framework saved a checkpoint: picks that no saved state needs any more can go.

        Args:
            complete: False where a framework says so only before it writes. They go at the next step then: a run that
                is killed while it saves is resumed from the checkpoint before, which still needs its picks.
        """
        self._saving = not complete
        if not complete:
            return
        if self._store is not None and self.history.probes:
            self._store.prune(self.history)

    def let_go(self) -> None:
        """Take every hook off model and optimizer, where a run does not come to its end."""
        self.techniques.finish_hooks()
        self.watch.let_go()

    def finish(self) -> dict[str, Any]:
        """At the end: finish techniques, drop what is not picked, write ``summary.json``, share picks; the summary."""
        try:
            self.techniques.finish()
        except BaseException:
            self.let_go()
            raise
        self.on_save()
        self.watch.finish(self.folder)
        picked = self._store.selected(self.history) if self._store and self.history.probes else {}
        training, probing = self._train_seconds(), self._probing
        figures = self.techniques.scalars()
        summary = self.ranks.on_first(
            lambda: write_summary(
                self.folder, self.history, picked, self._measuring, probing, training, figures
            )
        )
        if self._share is not None and self._store is not None and summary["picks"]:
            picks = {label: self._store.path(step) for label, step in summary["picks"].items()}
            run = FinishedRun(self.folder, picks, self.live.base, self._given_peers, self.history)
            share = self._share
            with self.live.base_readable():
                self.ranks.on_first(lambda: share(run))
        return summary

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-ready: the history, and what techniques keep.

        Where difficulty is tracked, that of each example, too; a collective then. The tensors of techniques are not in
        it: see :meth:`tensors`.
        """
        state: dict[str, Any] = {"version": STATE_VERSION, "history": self.history.to_json()}
        state |= self.watch.state()
        return state | ({"techniques": self.techniques.state_dict()} if self.techniques else {})

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that techniques need to go on, on the CPU. A collective where the model is sharded."""
        return self.techniques.tensors()

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Continue the history of an earlier run; call before :meth:`start`.

        Args:
            state: What :meth:`state_dict` gave.
            tensors: What :meth:`tensors` gave.

        Raises:
            HistoryError: If the state is of another version or damaged.
        """
        if state.get("version") != STATE_VERSION:
            raise HistoryError(
                f"the saved monitor state has version {state.get('version')}, not {STATE_VERSION}."
            )
        records = state.get("history")
        if not isinstance(records, list | tuple):
            raise HistoryError("the saved monitor state holds no history.")
        self._restored = History.from_json(records)
        self.watch.load(state)
        self.techniques.load(state.get("techniques", {}), tensors or {})

    def _make_store(self, save: Save | None) -> PickStore | None:
        if self.picks is None or self._prober is None:
            return None
        if save is None:
            raise OptionError("`picks` needs a way to save the model.")
        return PickStore(self.folder / "picks", self.picks, save, self.live.base.identity, self.ranks)

    def _make_sampler(self) -> Sampler | None:
        if self._sampled_every is None:
            return None
        last = next(iter(self.history.sampled[-1:]), None)
        return Sampler(self.live, self.peers, self.sketched, last=last)

    def _bind(self, model: nn.Module, step: int) -> None:
        """Open base and peers, on every rank alike."""
        restored = self.ranks.same(None if self._restored is None else self._restored.to_json())
        self._restored = None if restored is None else History.from_json(restored)
        known = self._restored.start if self._restored is not None else None
        recorded = known.base if known else None
        base = base_of_run(model, self.base, self.folder, step=step, recorded=recorded, ranks=self.ranks)
        self.live = LiveExpert(model, base, self.ranks)
        self.peers, self.sketched = peers_of_run(
            self._given_peers, self.live, self.ranks, probed=self.probe is not None
        )

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Inside, the model holds the weights to measure, evaluate and keep, of all that trains by now."""
        self.live.follow()
        if self._sampler is not None and self._sampler.vector is not self.live.vector:
            self._sampler = self._make_sampler()
        with turned(self._turning), self.techniques.shown():
            yield

    def _refine(self) -> None:
        """Find the finest copies of the weights anew: optimizers make theirs late, and may replace them."""
        if self._masters.needed:
            with self.ranks.together():
                self._masters.look()
            self.live.refine(self._masters.find)

    def _technique_run(self, step: int, total_steps: int | None, optimizers: Sequence[Any]) -> TechniqueRun:
        return TechniqueRun(
            self.live,
            optimizer=unwrapped(optimizers[0]) if len(optimizers) == 1 else None,
            peers=self.peers,
            sketched=self.sketched,
            ranks=self.ranks,
            step=step,
            total_steps=total_steps,
            history=lambda: self.history,
            probes=self.probe is not None,
        )

    def _since(self, began: float) -> float:
        """Seconds since then, by the first rank's clock: the schedule has to go on alike on all."""
        return self.ranks.same(time.perf_counter() - began)

    def _make_prober(self, evaluate: Evaluate | None, metric: str | None) -> Prober | None:
        if self.probe is None:
            return None
        function = self.probe.evaluate or evaluate
        if function is None:
            raise OptionError("the probe needs `evaluate`: a function from a model to metrics by name.")
        wanted = self.probe.metric or (metric if self.probe.evaluate is None else None)
        function = agreed(function, self.ranks)
        references, name = measure_references(self.live, self.peers, function, wanted)
        return Prober(self.probe, self.live, self.peers, function, name, references)

    def _open_history(self, step: int) -> None:
        records = [] if self._restored is None else list(self._restored)
        if any(record.step > step for record in records):
            raise HistoryError(f"the saved history goes beyond step {step}, where the run resumes.")
        with self.ranks.together():
            # The first rank writes what all know.
            self.history = (
                HistoryFile(self.folder / "history.jsonl", records)
                if self.ranks.is_first
                else History(records)
            )
        start = start_record(
            step, self.live, self.peers, self.sketched, self.probe, self._prober, self.techniques
        )
        self._append(*records_of_start(start, self.history.start))

    def _run_probe(self, step: int, known: Score | None = None) -> Record:
        if self._prober is None or self._probing is None:
            raise OptionError("there is no probe to run.")
        began = time.perf_counter()
        self._refine()
        try:
            record = self._prober.run(step, self.history, known)
        except MergeReadyError as error:
            error.add_note(f"while probing at step {step}; the weights were put back")
            raise
        self._probing.took(self._since(began))
        return record

    def _append(self, *records: Record) -> None:
        with self.ranks.together():
            for record in records:
                self.history.append(record)

    def _note(self, step: int, records: Sequence[Record]) -> Outcome:
        if not records:
            return Outcome()
        self._append(*records)
        values = {name: value for record in records for name, value in scalars(record).items()}
        if self._store is not None and self.history.probes and self.history.probes[-1].step == step:
            self._store.update(self.history)
        self._figures = {f"{PREFIX}{name}": value for name, value in self.techniques.scalars().items()}
        values |= self._figures
        self.techniques.on_history(self.history)
        decision = self._decide()
        if decision.stop and (self.on_stop == "stop" or not self.history.decisions):
            self._append(DecisionRecord(step=step, reason=decision.reason, acted=self.on_stop == "stop"))
            logger.info("step %d: %s", step, decision.reason)
        return Outcome(values, Decision(decision.stop and self.on_stop == "stop", decision.reason))

    def _decide(self) -> Decision:
        """What policy and techniques say. One that looks at more than the history may say stop on one rank only."""
        if self.stop is None and not self.techniques:
            return Decision(False, "")
        with self.ranks.together():
            own = self._own_decision()
        found = self.ranks.each(own)
        return next((decision for decision in found if decision.stop), found[0])

    def _own_decision(self) -> Decision:
        own = self.stop(self.history) if self.stop is not None else Decision(False, "")
        theirs = self.techniques.decide(self.history)
        reasons = [decision.reason for decision in (own, theirs) if decision.stop]
        return Decision(True, "; ".join(reasons)) if reasons else own

    def _train_seconds(self) -> float:
        spent = self._measuring.spent + (self._probing.spent if self._probing else 0.0)
        return max(time.perf_counter() - self._began - spent, 1e-9)

    def _make_probe_pacer(self, total_steps: int | None, step: int) -> Pacer | None:
        if self.probe is None or self._prober is None:
            return None
        spent = self._reference_seconds
        cost = self._prober.cost(spent)
        return Pacer(self.probe.schedule, total_steps, step, spent=spent, cost=cost)
