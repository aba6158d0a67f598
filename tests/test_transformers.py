from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from mergeready import NormGovernor
from mergeready.errors import (
    BaseMismatchError,
    EvaluationError,
    HistoryError,
    MismatchError,
    NotTrainedError,
    OptionError,
)
from mergeready.experts import open_expert
from mergeready.training.history import read_history
from mergeready.training.peers import Peer
from mergeready.training.picks import Picks
from mergeready.training.policies import Decision, MergedPlateau, NormBudget
from mergeready.training.probe import Probe
from mergeready.training.schedule import Schedule
from mergeready.transformers import MergeReadyCallback
from tests.models import perturb, tiny_bert
from tests.ranks import exit_code
from tests.trainers import Tokens, arguments, make_trainer, right_or_wrong, weights_of

OFTEN = Schedule(every=2)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A base and two peers on disk."""
    tiny_bert().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        perturb(tiny_bert(), seed).save_pretrained(tmp_path / f"peer-{seed}")
    return tmp_path


def load(world: Path) -> nn.Module:
    return BertForSequenceClassification.from_pretrained(world / "base")


def peers(world: Path) -> list[Path]:
    return [world / "peer-1", world / "peer-2"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapted(world: Path) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(load(world), LoraConfig(r=4, target_modules=["query", "value"], use_dora=False))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_probes_leave_no_trace(world: Path, kind: str, accumulation: int) -> None:
    """Twenty probes or none: the trained weights are the same, bit by bit."""
    make = load if kind == "full" else adapted
    settings = {"max_steps": 20, "gradient_accumulation_steps": accumulation}
    plain = make_trainer(world / "plain", model=make(world), **settings)
    plain.train()
    probe = Probe(
        merge=["ties", "task_arithmetic"],
        evaluate=right_or_wrong(),
        max_evaluations=3,
        schedule=Schedule(every=1),
    )
    callback = MergeReadyCallback(
        base=world / "base", peers=peers(world), probe=probe, measure=Schedule(every=1)
    )
    watched = make_trainer(world / "watched", callback, model=make(world), **settings)
    watched.train()
    assert len(callback.history.probes) == 20
    assert equal(weights_of(plain.model), weights_of(watched.model))


def test_probes_with_the_trainers_own_evaluation_leave_no_trace(world: Path) -> None:
    plain = make_trainer(world / "plain", model=load(world), eval_strategy="steps", eval_steps=3)
    plain.train()
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN))
    watched = make_trainer(
        world / "watched", callback, model=load(world), eval_strategy="steps", eval_steps=3
    )
    watched.train()
    assert equal(weights_of(plain.model), weights_of(watched.model))
    own = [{k: v for k, v in entry.items() if "mergeready" not in k} for entry in watched.state.log_history]
    timing = ("runtime", "per_second")
    strip = lambda log: [{k: v for k, v in e.items() if not any(t in k for t in timing)} for e in log]  # noqa: E731
    assert strip(plain.state.log_history) == [e for e in strip(own) if set(e) - {"epoch", "step"}]


def test_scalars_are_in_the_trainers_log_and_its_own_log_is_kept(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge=["ties", "average"], schedule=OFTEN))
    trainer = make_trainer(world / "run", callback, model=load(world), logging_steps=2)
    trainer.train()
    log = trainer.state.log_history
    probed = [entry for entry in log if "mergeready/merged/ties" in entry]
    assert [entry["step"] for entry in probed] == [1, 2, 4, 6, 8, 10, 12]
    names = {"mergeready/expert", "mergeready/merged/average", "mergeready/scale/ties", "mergeready/norm"}
    assert names <= set(probed[0])
    assert (
        len([entry for entry in log if "loss" in entry]) == 6
    )  # logging from a callback must not eat Trainer's


def test_reporters_receive_the_scalars(world: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN))
    make_trainer(world / "run", Reporter(), callback, model=load(world)).train()
    assert any("mergeready/merged/task_arithmetic" in logs for logs in seen)


def test_files_of_a_run(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN))
    trainer = make_trainer(world / "run", callback, model=load(world))
    trainer.train()
    folder = world / "run" / "mergeready"
    history = read_history(folder / "history.jsonl")
    assert list(history) == list(callback.history)
    index = json.loads((folder / "picks" / "picks.json").read_text())
    assert set(index) == {"expert-best", "merge-best"}
    for label, pick in index.items():
        expert = open_expert(folder / "picks" / pick["folder"], world / "base")
        assert expert.base_checked == "recorded", label
    steps = {pick["step"] for pick in index.values()}
    assert {path.name for path in (folder / "picks").iterdir() if path.is_dir()} == {
        f"step-{s:06}" for s in steps
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["picks"] == {label: pick["step"] for label, pick in index.items()}


def test_picks_hold_the_weights_of_their_step(world: Path) -> None:
    kept: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            kept[state.global_step] = weights_of(model)

    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN), picks=Picks(pareto=2))
    make_trainer(world / "run", Keep(), callback, model=load(world), learning_rate=3e-3).train()
    folder = world / "run" / "mergeready" / "picks"
    for pick in json.loads((folder / "picks.json").read_text()).values():
        loaded = BertForSequenceClassification.from_pretrained(folder / pick["folder"])
        assert equal(weights_of(loaded), kept[pick["step"]])


def test_a_lora_run_picks_adapters(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties", schedule=OFTEN))
    trainer = make_trainer(world / "run", callback, model=adapted(world), learning_rate=1e-2)
    trainer.train()
    folder = world / "run" / "mergeready" / "picks"
    pick = json.loads((folder / "picks.json").read_text())["merge-best"]
    assert open_expert(folder / pick["folder"], world / "base").format == "peft"
    assert callback.history.metrics[-1].norm > 0


def test_stops_on_the_merged_plateau_and_saves(world: Path) -> None:
    callback = MergeReadyCallback(
        peers=peers(world), probe=Probe(schedule=OFTEN), stop=NormBudget(max_norm=1e-3)
    )
    trainer = make_trainer(world / "run", callback, model=load(world), save_strategy="steps", save_steps=100)
    trainer.train()
    assert trainer.state.global_step == 1
    assert (world / "run" / "checkpoint-1").is_dir()
    [decision] = callback.history.decisions
    assert decision.acted
    assert "beyond" in decision.reason


def test_record_only_goes_on(world: Path) -> None:
    callback = MergeReadyCallback(
        peers=peers(world), probe=Probe(schedule=OFTEN), stop=NormBudget(max_norm=1e-3), on_stop="record"
    )
    trainer = make_trainer(world / "run", callback, model=load(world))
    trainer.train()
    assert trainer.state.global_step == 12
    assert [d.acted for d in callback.history.decisions] == [False]


def test_merged_metric_chooses_the_best_model(world: Path) -> None:
    callback = MergeReadyCallback(
        peers=peers(world), probe=Probe(merge="ties", schedule=Schedule(every=1000))
    )
    trainer = make_trainer(
        world / "run",
        callback,
        EarlyStoppingCallback(early_stopping_patience=50),
        model=load(world),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="mergeready/merged/ties",
        greater_is_better=True,
    )
    trainer.train()
    values = {p.step: p.merges["ties"].merged for p in callback.history.probes}
    assert {3, 6, 9, 12} <= set(values)
    assert trainer.state.best_metric == max(values[s] for s in (3, 6, 9, 12))


def test_early_stopping_before_us_is_refused(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties"))
    trainer = make_trainer(
        world / "run",
        EarlyStoppingCallback(),
        callback,
        model=load(world),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="mergeready/merged/ties",
        greater_is_better=True,
    )
    with pytest.raises(OptionError, match="Put MergeReadyCallback first"):
        trainer.train()


def test_surrogates_are_labelled(world: Path) -> None:
    callback = MergeReadyCallback(probe=Probe(merge="ties", schedule=OFTEN))
    trainer = make_trainer(world / "run", callback, model=load(world))
    trainer.train()
    assert all(probe.surrogate for probe in callback.history.probes)
    names = {name for entry in trainer.state.log_history for name in entry}
    assert "mergeready/surrogate/ties" in names
    assert "mergeready/alone/0.3" in names
    assert not any(name.startswith("mergeready/merged") for name in names)


def test_peers_tasks_are_measured(world: Path) -> None:
    peer = Peer(world / "peer-1", evaluate=right_or_wrong(seed=5), name="law")
    probe = Probe(evaluate=right_or_wrong(), schedule=OFTEN)
    callback = MergeReadyCallback(peers=[peer, world / "peer-2"], probe=probe)
    make_trainer(world / "run", callback, model=load(world)).train()
    tasks = callback.history.probes[-1].merges["task_arithmetic"].tasks
    assert set(tasks) == {"own", "law"}
    start = callback.history.start
    assert start is not None
    assert set(start.references["law"]) == {"base", "expert"}


def same_run(
    world: Path, folder: Path, steps: int = 12, **changes: Any
) -> tuple[Trainer, MergeReadyCallback]:
    callback = MergeReadyCallback(
        peers=peers(world),
        probe=Probe(merge=["ties", "task_arithmetic"], schedule=Schedule(every=3)),
        measure=Schedule(every=2),
        stop=MergedPlateau(patience=100),
    )
    trainer = make_trainer(
        folder, callback, model=load(world), max_steps=steps, save_strategy="steps", save_steps=4, **changes
    )
    return trainer, callback


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class Kill(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(world: Path, folder: Path, at: int) -> None:
    trainer, _ = same_run(world, folder)
    trainer.add_callback(Kill(at))
    trainer.train()


def test_killed_and_resumed_equals_uninterrupted(world: Path) -> None:
    whole, _ = same_run(world, world / "whole")
    whole.train()
    expected = contents(world / "whole")
    for at in (5, 7, 11):
        folder = world / f"killed-{at}"
        assert exit_code(killed, world, folder, at) == -signal.SIGKILL
        resumed, _ = same_run(world, folder)
        resumed.train(resume_from_checkpoint=True)
        assert equal(weights_of(whole.model), weights_of(resumed.model))
        assert contents(folder) == expected


def contents(folder: Path) -> dict[Path, bytes | None]:
    """The history and everything in the folder of picks; None for a folder."""
    found = [folder / "mergeready/history.jsonl", *(folder / "mergeready/picks").rglob("*")]
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in found}


def test_resume_without_a_base_finds_its_snapshot(world: Path) -> None:
    """Weights are loaded before the first event on resume: the base must not be taken then."""
    torch.manual_seed(0)

    def run(folder: Path, steps: int, resume: bool) -> MergeReadyCallback:
        callback = MergeReadyCallback(measure=Schedule(every=2))
        make_trainer(
            folder,
            callback,
            model=tiny_bert(),
            max_steps=steps,
            save_strategy="steps",
            save_steps=4,
            lr_scheduler_type="constant",
        ).train(resume_from_checkpoint=resume or None)
        return callback

    whole = run(world / "a", 8, False)
    run(world / "b", 4, False)
    resumed = run(world / "b", 8, True)
    assert [m.norm for m in resumed.history.metrics] == [m.norm for m in whole.history.metrics if m.step <= 8]


def test_resume_without_any_base_is_refused(world: Path) -> None:
    make_trainer(world / "run", model=tiny_bert(), max_steps=4, save_strategy="steps", save_steps=4).train()
    trainer = make_trainer(world / "run", MergeReadyCallback(), model=tiny_bert(), max_steps=8)
    with pytest.raises(HistoryError, match="Pass `base`"):
        trainer.train(resume_from_checkpoint=str(world / "run" / "checkpoint-4"))


def test_resume_of_a_run_that_had_no_callback(world: Path) -> None:
    make_trainer(world / "run", model=load(world), max_steps=4, save_strategy="steps", save_steps=4).train()
    callback = MergeReadyCallback(base=world / "base", measure=Schedule(every=2))
    trainer = make_trainer(
        world / "run", callback, model=load(world), max_steps=8, save_strategy="steps", save_steps=4
    )
    trainer.train(resume_from_checkpoint=str(world / "run" / "checkpoint-4"))
    assert callback.history.metrics[0].step == 6
    assert callback.history.metrics[0].norm > 0


def test_changed_peers_on_resume_are_recorded(world: Path) -> None:
    trainer, _ = same_run(world, world / "run", steps=8)
    trainer.train()
    callback = MergeReadyCallback(peers=[world / "peer-1"], probe=Probe(merge="ties", schedule=OFTEN))
    again = make_trainer(world / "run", callback, model=load(world), max_steps=12)
    again.train(resume_from_checkpoint=str(world / "run" / "checkpoint-8"))
    [resumed] = [record for record in callback.history if record.kind == "resume"]
    assert {"peers", "methods"} <= set(resumed.changed)


def test_two_callbacks_are_refused(world: Path) -> None:
    """Both would keep their state under one key of the Trainer's, and write into one folder."""
    trainer = make_trainer(world / "run", MergeReadyCallback(), MergeReadyCallback(), model=load(world))
    with pytest.raises(OptionError, match="holds several MergeReadyCallbacks"):
        trainer.train()


@pytest.mark.parametrize("restore", [False, True])
def test_the_trainers_own_restoring_of_callbacks_does_not_matter(world: Path, restore: bool) -> None:
    """With it, ExportableState would make a new object without peers; without it, restore nothing."""
    first, _ = same_run(world, world / "run", steps=8)
    first.train()
    trainer, callback = same_run(world, world / "run", restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=str(world / "run" / "checkpoint-4"))
    assert callback in trainer.callback_handler.callbacks
    assert [probe.step for probe in callback.history.probes] == [1, 2, 3, 6, 9, 12]
    assert len(callback.monitor.peers) == 2


def test_a_model_that_is_made_inside_train_is_watched(world: Path) -> None:
    """With model_init, what was there before train() is not what is trained."""
    callback = MergeReadyCallback(measure=Schedule(every=4))
    trainer = Trainer(
        args=arguments(world / "run", max_steps=4),
        model_init=lambda: load(world),
        train_dataset=Tokens(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.monitor.live.model is trainer.model
    assert callback.history.metrics[-1].norm > 0


def test_the_best_model_is_loaded_before_training_ends_and_stays(world: Path) -> None:
    """The Trainer loads it before on_train_end; finishing must neither measure nor change it."""
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties", schedule=OFTEN))
    trainer = make_trainer(
        world / "run",
        callback,
        model=load(world),
        learning_rate=3e-3,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="mergeready/merged/ties",
        greater_is_better=True,
    )
    trainer.train()
    best = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert equal(weights_of(best), weights_of(trainer.model))
    assert callback.history[-1].step == 12


BY_MERGED: dict[str, Any] = {
    "learning_rate": 3e-3,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "mergeready/merged/ties",
    "greater_is_better": True,
}


@pytest.mark.parametrize("name", ["norm", "sampled/norm", "norm_governor/norm"])
@pytest.mark.parametrize("probed", [True, False])
def test_any_scalar_chooses_the_best_model(world: Path, name: str, probed: bool) -> None:
    callback = MergeReadyCallback(
        base=world / "base",
        peers=peers(world),
        probe=Probe(merge="ties", schedule=OFTEN) if probed else None,
        measure=Schedule(every=4),
        sampled_every=1,
        techniques=[NormGovernor(max_norm=100.0)],
    )
    changes = BY_MERGED | {"metric_for_best_model": f"mergeready/{name}", "greater_is_better": False}
    trainer = make_trainer(world / "run", callback, model=load(world), **changes, max_steps=8)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(callback.history.metrics[2].norm, rel=0.1)


@pytest.mark.parametrize(("metric", "right"), [("accuracy", True), ("loss", False)])
def test_the_best_model_is_not_the_worst(world: Path, metric: str, right: bool) -> None:
    """The Trainer takes more to be better where the name does not end in loss, and ours is that of a merge."""
    for direction in (None, right, not right):
        callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties", metric=metric))
        changes = BY_MERGED | {"greater_is_better": direction, "max_steps": 4}
        trainer = make_trainer(world / "run", callback, model=load(world), **changes)
        if trainer.args.greater_is_better == right:
            trainer.train()
        else:
            with pytest.raises(OptionError, match=f"is {metric} here.*set greater_is_better={right}"):
                trainer.train()


def own_scores(*values: float) -> Any:
    """Evaluations in their order: of the base, then at each probe of the expert and of two merges; the last stays."""
    left = list(values)
    return lambda model: {"score": left.pop(0) if len(left) > 1 else left[0]}


def test_where_there_is_no_retention_the_trainer_goes_on(world: Path) -> None:
    """At first the expert is no better than the base; the Trainer knows no metrics that are missing."""
    probe = Probe(
        merge="ties",
        evaluate=own_scores(0.0, -1.0, 0.5, 0.5, 1.0, 0.5, 0.5),
        scales=(0.4, 0.8),
        max_evaluations=2,
        schedule=Schedule(every=4, geometric=False),
    )
    callback = MergeReadyCallback(peers=peers(world), probe=probe)
    changes = BY_MERGED | {"metric_for_best_model": "mergeready/retention/ties", "max_steps": 8}
    trainer = make_trainer(world / "run", callback, model=load(world), **changes)
    trainer.train()
    assert [probe.merges["ties"].retention for probe in callback.history.probes] == [None, 0.5]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 8)


@pytest.mark.parametrize(
    ("name", "probed", "message"),
    [
        ("merged/tie", True, "They give mergeready/expert, mergeready/merged/ties"),
        ("merged/ties", False, "the run has none"),
    ],
)
def test_a_metric_that_never_comes_is_refused_at_the_start(
    world: Path, name: str, probed: bool, message: str
) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties") if probed else None)
    changes = BY_MERGED | {"metric_for_best_model": f"mergeready/{name}"}
    trainer = make_trainer(world / "run", callback, model=load(world), **changes)
    with pytest.raises(OptionError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_less_retention_is_not_better(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties"))
    changes = BY_MERGED | {"metric_for_best_model": "mergeready/retention/ties", "greater_is_better": False}
    trainer = make_trainer(world / "run", callback, model=load(world), **changes)
    with pytest.raises(OptionError, match=r"is retention here.*set greater_is_better=True"):
        trainer.train()


def test_an_evaluation_after_training_is_not_taken_for_the_last_step_s(world: Path) -> None:
    """The best model has been loaded by then."""
    probe = Probe(merge="ties", scales=(0.5,), max_evaluations=1, schedule=Schedule(first=100))
    callback = MergeReadyCallback(peers=peers(world), probe=probe)
    trainer = make_trainer(world / "run", callback, model=load(world), **BY_MERGED, max_steps=10)
    trainer.add_callback(StopAfter(9))
    trainer.train()
    records, summary = list(callback.history), (world / "run/mergeready/summary.json").read_text()
    files = sorted((world / "run/mergeready").rglob("*"))
    metrics = trainer.evaluate()
    assert trainer.state.global_step == 9
    assert not [name for name in metrics if "mergeready" in name]
    assert list(callback.history) == records
    assert sorted((world / "run/mergeready").rglob("*")) == files
    assert (world / "run/mergeready/summary.json").read_text() == summary


def test_an_evaluation_before_the_first_step_is_no_probe(world: Path) -> None:
    """There is no expert yet, and nothing to pick."""
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(merge="ties", schedule=Schedule(every=4)))
    make_trainer(
        world / "run", callback, model=load(world), **BY_MERGED, max_steps=4, eval_on_start=True
    ).train()
    assert callback.history.probes[0].step == 1


def test_adding_the_callback_later(world: Path) -> None:
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN))
    trainer = make_trainer(world / "run", model=load(world))
    callback.attach(trainer).attach(trainer)
    trainer.train()
    assert callback.history.probes


def test_a_callback_serves_one_trainer_after_the_other(world: Path) -> None:
    """As in a cross-validation; the first Trainer may still be there."""
    callback = MergeReadyCallback(peers=peers(world), probe=Probe(schedule=OFTEN))
    trainers = []
    for name in ("first", "second"):
        trainers.append(make_trainer(world / name, callback, model=load(world)))
        trainers[-1].train()
        assert callback.monitor.live.model is trainers[-1].model
        assert (world / name / "mergeready/summary.json").exists()
    logged = [sum("mergeready/expert" in entry for entry in t.state.log_history) for t in trainers]
    assert logged[0] == logged[1] > 0


class TestBadInput:
    def run(self, world: Path, callback: MergeReadyCallback, **changes: Any) -> None:
        model = load(world)
        before = weights_of(model)
        try:
            make_trainer(world / "run", callback, model=model, **changes).train()
        finally:
            assert equal(before, weights_of(model)), "an error before training must not change the model"

    def test_wrong_base(self, world: Path) -> None:
        tiny_bert(seed=5).save_pretrained(world / "other")
        with pytest.raises(BaseMismatchError, match="does not descend from"):
            self.run(world, MergeReadyCallback(base=world / "other"))

    def test_peer_of_another_base(self, world: Path) -> None:
        tiny_bert(seed=5).save_pretrained(world / "stranger")
        with pytest.raises(BaseMismatchError, match="stranger does not descend"):
            self.run(world, MergeReadyCallback(peers=[world / "stranger"]))

    def test_peer_is_the_base(self, world: Path) -> None:
        with pytest.raises(NotTrainedError, match="is the base itself"):
            self.run(world, MergeReadyCallback(peers=[world / "base"]))

    def test_peer_of_other_shapes(self, world: Path) -> None:
        from tests.models import bert_config

        BertForSequenceClassification(bert_config(intermediate_size=20)).save_pretrained(world / "odd")
        with pytest.raises(MismatchError, match=r"layer.0.intermediate.dense.weight is \(20, 32\).*layer.1"):
            self.run(world, MergeReadyCallback(peers=[world / "odd"]))

    def test_single_peer_not_in_a_list(self, world: Path) -> None:
        with pytest.raises(OptionError, match="put a single one into a list"):
            MergeReadyCallback(peers=str(world / "peer-1"))  # type: ignore[arg-type]

    def test_evaluation_that_raises(self, world: Path) -> None:
        def broken(model: nn.Module) -> dict[str, float]:
            raise RuntimeError("no such column")

        with pytest.raises(EvaluationError, match="raised RuntimeError: no such column"):
            self.run(world, MergeReadyCallback(peers=peers(world), probe=Probe(evaluate=broken)))

    def test_evaluation_that_returns_nan(self, world: Path) -> None:
        probe = Probe(evaluate=lambda model: {"accuracy": float("nan")})
        with pytest.raises(EvaluationError, match="returned nan as accuracy"):
            self.run(world, MergeReadyCallback(peers=peers(world), probe=probe))

    def test_metric_that_is_not_returned(self, world: Path) -> None:
        probe = Probe(evaluate=lambda model: {"accuracy": 1.0, "f1": 1.0}, metric="recall")
        with pytest.raises(EvaluationError, match="returned no 'recall', only accuracy, f1"):
            self.run(world, MergeReadyCallback(peers=peers(world), probe=probe))

    def test_ambiguous_metric(self, world: Path) -> None:
        probe = Probe(evaluate=lambda model: {"accuracy": 1.0, "f1": 1.0})
        with pytest.raises(EvaluationError, match="say which one with `metric`"):
            self.run(world, MergeReadyCallback(peers=peers(world), probe=probe))

    def test_empty_evaluation_data(self, world: Path) -> None:
        probe = Probe(evaluate=lambda model: {"accuracy": torch.zeros(0)})
        with pytest.raises(EvaluationError, match="saw no examples"):
            self.run(world, MergeReadyCallback(peers=peers(world), probe=probe))

    def test_no_evaluation_at_all(self, world: Path) -> None:
        callback = MergeReadyCallback(peers=peers(world), probe=Probe())
        trainer = Trainer(load(world), arguments(world / "run"), train_dataset=Tokens(), callbacks=[callback])
        with pytest.raises(OptionError, match="the probe needs `evaluate`"):
            trainer.train()


def test_evaluation_that_fails_in_the_middle_puts_the_weights_back(world: Path) -> None:
    calls = {"n": 0}

    def sometimes(model: nn.Module) -> dict[str, float]:
        calls["n"] += 1
        if calls["n"] == 9:
            raise RuntimeError("lost connection")
        return {"accuracy": 0.5}

    kept: dict[str, Any] = {}

    class Before(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            kept["weights"], kept["rng"] = weights_of(model), torch.get_rng_state()

    callback = MergeReadyCallback(
        peers=peers(world), probe=Probe(evaluate=sometimes, schedule=Schedule(every=1))
    )
    trainer = make_trainer(world / "run", Before(), callback, model=load(world))
    with pytest.raises(EvaluationError, match="lost connection"):
        trainer.train()
    assert equal(kept["weights"], weights_of(trainer.model))
    assert torch.equal(kept["rng"], torch.get_rng_state())
    assert (
        len(read_history(world / "run" / "mergeready" / "history.jsonl").probes)
        == trainer.state.global_step - 1
    )


def test_decision_reasons_reach_the_history(world: Path) -> None:
    callback = MergeReadyCallback(
        measure=OFTEN, stop=lambda history: Decision(len(history.metrics) > 2, "enough")
    )
    make_trainer(world / "run", callback, model=load(world)).train()
    assert callback.history.decisions[0].reason == "enough"
