from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from mergeready import NormBudget, NormGovernor, Probe, Schedule
from mergeready.errors import EvaluationError, OptionError
from mergeready.lightning import MergeReadyCallback
from tests.loops import Lit, lightning_trainer, load, loader, make_world, optimizer_of, options
from tests.trainers import Tokens, weights_of

MERGED, RETENTION = "mergeready/merged/ties", "mergeready/retention/ties"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def score(model: nn.Module) -> dict[str, float]:
    """A metric that differs from step to step."""
    return {"score": -float(model(**Tokens(24, seed=1)[range(24)]).loss)}


def ties(every: int = 3) -> Probe:
    schedule = Schedule(every=every, geometric=False)
    return Probe(
        merge="ties",
        scales=(0.4, 0.8),
        max_evaluations=2,
        evaluate=score,
        schedule=schedule,
    )


def test_micro_batches_are_not_counted(world: Path, tmp_path: Path) -> None:
    """on_train_batch_end fires for each of them; only the optimizer's steps count."""
    callback = MergeReadyCallback(**options(world, probe=None, measure=Schedule(every=1)))
    trainer = lightning_trainer(tmp_path, callback, max_steps=5, accumulate_grad_batches=3)
    trainer.fit(Lit(load(world)), loader(batch_size=4))
    assert [record.step for record in callback.history.metrics] == [1, 2, 3, 4, 5]


def test_probes_leave_no_trace(world: Path, tmp_path: Path) -> None:
    """Also not in what validation and dropout draw."""
    trained = []
    for callbacks in ([], [MergeReadyCallback(**options(world, probe=ties(every=1)))]):
        torch.manual_seed(0)
        model = load(world)
        model.config.hidden_dropout_prob = 0.1
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        trainer = lightning_trainer(
            tmp_path, *callbacks, max_steps=6, limit_val_batches=2, val_check_interval=2
        )
        trainer.fit(Lit(model), loader(), loader())
        trained.append(weights_of(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_checkpoints_can_monitor_the_merged_metric(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=ties()))
    checkpoint = ModelCheckpoint(tmp_path, monitor=MERGED, mode="max", every_n_train_steps=3)
    lightning_trainer(tmp_path, checkpoint, callback).fit(Lit(load(world)), loader())
    merged = [value for _, value in callback.history.merged("ties")]
    assert len(set(merged)) == len(merged) == 4
    assert float(checkpoint.best_model_score) == pytest.approx(max(merged))


def test_checkpoints_at_steps_between_probes_see_the_last_one(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=ties(every=2)))
    checkpoint = ModelCheckpoint(tmp_path, monitor=MERGED, mode="max", every_n_train_steps=3, save_top_k=-1)
    lightning_trainer(tmp_path, callback, checkpoint, max_steps=5).fit(Lit(load(world)), loader())
    assert float(checkpoint.current_score) == pytest.approx(callback.history.probes[0].merges["ties"].merged)


@pytest.mark.parametrize(
    ("watching", "message"),
    [
        (
            lambda folder: ModelCheckpoint(folder, monitor=MERGED),
            "watches score, of which more.*set mode='max'",
        ),
        (lambda folder: EarlyStopping("mergeready/expert"), "watches score, of which more.*set mode='max'"),
        (lambda folder: ModelCheckpoint(folder, monitor=RETENTION), "watches retention.*set mode='max'"),
        (lambda folder: EarlyStopping(RETENTION, mode="max"), "set check_finite=False"),
        (
            lambda folder: ModelCheckpoint(folder, monitor=f"{MERGED}s"),
            f"They give mergeready/expert, {MERGED},",
        ),
        (lambda folder: ModelCheckpoint(folder, monitor="mergeready/norm"), None),
        (lambda folder: ModelCheckpoint(folder, monitor="val_loss"), None),
    ],
)
def test_the_best_checkpoint_is_not_the_worst(
    world: Path, tmp_path: Path, watching: Any, message: str | None
) -> None:
    """Lightning takes less to be better by default, and never saves by a metric that does not come."""
    callback = MergeReadyCallback(**options(world, probe=ties()))
    trainer = lightning_trainer(tmp_path, callback, watching(tmp_path), max_steps=1)
    if message is None:
        trainer.fit(Lit(load(world)), loader())
        return
    with pytest.raises(OptionError, match=message):
        trainer.fit(Lit(load(world)), loader())
    assert trainer.global_step == 0


def test_less_of_a_loss_is_better(world: Path, tmp_path: Path) -> None:
    probe = replace(ties(), evaluate=lambda model: {"loss": -score(model)["score"]})
    callback = MergeReadyCallback(**options(world, probe=probe))
    checkpoint = ModelCheckpoint(tmp_path, monitor=MERGED, mode="max")
    with pytest.raises(OptionError, match=r"watches loss, of which less.*set mode='min'"):
        lightning_trainer(tmp_path, callback, checkpoint).fit(Lit(load(world)), loader())


def test_a_step_without_retention_does_not_pass_for_the_one_before(world: Path, tmp_path: Path) -> None:
    scores = iter(
        [0.0, 1.0, 0.5, 0.5, -1.0, 0.5, 0.5]
    )  # the base, and at each probe the expert and two merges
    probe = replace(ties(), evaluate=lambda model: {"score": next(scores)})
    callback = MergeReadyCallback(**options(world, probe=probe))
    checkpoint = ModelCheckpoint(
        tmp_path, "{step}", monitor=RETENTION, mode="max", save_top_k=-1, every_n_train_steps=3
    )
    lightning_trainer(tmp_path, callback, checkpoint, max_steps=6).fit(Lit(load(world)), loader())
    assert [probe.merges["ties"].retention for probe in callback.history.probes] == [0.5, None]
    assert float(checkpoint.current_score) == -math.inf
    assert Path(checkpoint.best_model_path).name == "step=3.ckpt"


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_can_monitor_the_merged_metric(world: Path, tmp_path: Path, first: bool) -> None:
    """Validation starts with a probe, so that early stopping sees this step's value wherever it stands."""
    callback = MergeReadyCallback(**options(world, probe=ties(every=1000), stop=None))
    stopping = EarlyStopping(MERGED, mode="max", patience=1, min_delta=10.0)
    order = [callback, stopping] if first else [stopping, callback]
    trainer = lightning_trainer(
        tmp_path, *order, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=2
    )
    trainer.fit(Lit(load(world)), loader(), loader())
    assert trainer.global_step == 4
    assert [probe.step for probe in callback.history.probes] == [2, 4]
    assert float(stopping.best_score) == pytest.approx(callback.history.merged("ties")[0][1])


def test_validation_does_not_probe_unless_something_monitors_us(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=ties(every=3)))
    trainer = lightning_trainer(
        tmp_path, callback, max_steps=4, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=2
    )
    module = Lit(load(world))
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    assert [probe.step for probe in callback.history.probes] == [3, 4]


def test_loggers_get_the_scalars_of_their_step(world: Path, tmp_path: Path) -> None:
    """Lightning itself would log every fiftieth step only."""
    callback = MergeReadyCallback(**options(world, probe=ties(), measure=Schedule(every=4)))
    logger = CSVLogger(tmp_path, name="", version="log")
    lightning_trainer(tmp_path, callback, logger=logger).fit(Lit(load(world)), loader())
    with (tmp_path / "log/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["step"]): float(row[MERGED]) for row in rows if row[MERGED]} == dict(
        callback.history.merged("ties")
    )
    norms = {int(row["step"]): float(row["mergeready/norm"]) for row in rows if row["mergeready/norm"]}
    assert norms == {record.step: record.norm for record in callback.history.metrics}


def test_tensorboard_gets_scalars_and_images(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the dev extra brings tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = MergeReadyCallback(**options(world, probe=ties()))
    logger = TensorBoardLogger(tmp_path, name="", version="log")
    lightning_trainer(tmp_path, callback, logger=logger).fit(Lit(load(world)), loader())
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars(MERGED)]
    assert logged == [(step, pytest.approx(value)) for step, value in callback.history.merged("ties")]
    for name in ("mergeready/figures/curve/ties", "mergeready/figures/growth"):
        [image] = events.Images(name)
        assert image.step == 12
        assert image.width > image.height > 100


def test_ranks_stop_together(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process decides goes through the strategy, so that no other waits for it for ever."""
    asked: list[tuple[bool, bool]] = []
    callback = MergeReadyCallback(**options(world, probe=None, measure=Schedule(every=3, geometric=False)))
    trainer = lightning_trainer(tmp_path, callback)

    def another_rank_stops(decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        asked.append((decision, all))
        return len(asked) == 2

    monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", another_rank_stops)
    trainer.fit(Lit(load(world)), loader())
    assert asked == [(False, False), (False, False)]
    assert trainer.global_step == 6


def test_binds_after_restoring(world: Path, tmp_path: Path) -> None:
    """setup and on_fit_start come before the checkpoint is read under some strategies; on_train_start after all."""
    first = MergeReadyCallback(**options(world, probe=None))
    checkpoint = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    lightning_trainer(tmp_path, first, checkpoint, max_steps=8).fit(Lit(load(world)), loader())
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:
            seen.append(second.monitor.started)

        def on_train_start(self, *_: Any) -> None:
            seen.append(second.monitor.started)

    second = MergeReadyCallback(**options(world, probe=None, measure=Schedule(every=1)))
    trainer = lightning_trainer(tmp_path / "new", second, Look(), max_steps=9)
    trainer.fit(Lit(load(world)), loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert seen == [False, True]
    assert second.history.metrics[-1].step == 9
    assert second.history.metrics[-1].norm > first.history.metrics[0].norm > 0


def test_checkpoints_hold_plain_data(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=None))
    checkpoint = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4)
    lightning_trainer(tmp_path, callback, checkpoint, max_steps=4).fit(Lit(load(world)), loader())
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["mergeready"]
    assert [record["step"] for record in saved["history"]] == [0, 1, 2, 4]


def test_resume_of_a_run_that_had_no_callback(world: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    lightning_trainer(tmp_path, checkpoint, max_steps=8).fit(Lit(load(world)), loader())
    callback = MergeReadyCallback(**options(world, probe=None))
    lightning_trainer(tmp_path / "new", callback).fit(
        Lit(load(world)), loader(), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert [record.step for record in callback.history.metrics] == [10, 12]


def test_a_resumed_run_has_the_last_metric_before_its_first_probe(world: Path, tmp_path: Path) -> None:
    """A checkpoint that monitors it would else be refused."""
    first = MergeReadyCallback(**options(world, probe=ties(every=8)))
    saved = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    lightning_trainer(tmp_path, first, saved, max_steps=8).fit(Lit(load(world)), loader())
    second = MergeReadyCallback(**options(world, probe=ties(every=1000)))
    checkpoint = ModelCheckpoint(tmp_path / "new", monitor=MERGED, mode="max", every_n_train_steps=1)
    lightning_trainer(tmp_path, second, checkpoint, max_steps=10).fit(
        Lit(load(world)), loader(), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert [probe.step for probe in second.history.probes] == [8, 10]
    assert checkpoint.best_model_score is not None


def test_a_second_fit_goes_on_and_a_new_trainer_starts_anew(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=None))
    module = Lit(load(world))
    trainer = lightning_trainer(tmp_path, callback, max_epochs=1, max_steps=-1)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [record.step for record in callback.history.metrics] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    lightning_trainer(tmp_path, callback, max_steps=2).fit(Lit(load(world)), loader())
    assert [record.step for record in callback.history.metrics] == [1, 2]


def test_validating_a_checkpoint_leaves_the_history_of_the_run(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=None))
    checkpoint = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4)
    trainer = lightning_trainer(tmp_path, callback, checkpoint, limit_val_batches=1, max_steps=6)
    module = Lit(load(world))
    trainer.fit(module, loader())
    before = list(callback.history)
    assert before[-1].step == 6
    trainer.validate(module, loader(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert list(callback.history) == before


def test_a_run_that_raises_leaves_no_hooks(world: Path, tmp_path: Path) -> None:
    class Breaking(Lit):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, index)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    module = Breaking(load(world))
    optimizer = optimizer_of(module.net)
    callback = MergeReadyCallback(**options(world, probe=None, techniques=[NormGovernor(max_norm=0.1)]))
    with pytest.raises(RuntimeError, match="out of memory"):
        lightning_trainer(tmp_path, callback).fit(module, loader())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_two_callbacks_are_refused(world: Path, tmp_path: Path) -> None:
    """They would overwrite each other's state; Lightning sees it by the state's key."""
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        lightning_trainer(tmp_path, MergeReadyCallback(), MergeReadyCallback())


def test_an_evaluation_that_raises_ends_the_run_before_it_begins(world: Path, tmp_path: Path) -> None:
    def broken(model: nn.Module) -> dict[str, float]:
        raise RuntimeError("no such column")

    model = load(world)
    before = weights_of(model)
    callback = MergeReadyCallback(**options(world, probe=Probe(evaluate=broken)))
    with pytest.raises(EvaluationError, match="no such column"):
        lightning_trainer(tmp_path, callback).fit(Lit(model), loader())
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_a_probe_needs_its_evaluation(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(**options(world, probe=Probe()))
    with pytest.raises(OptionError, match="needs `evaluate`"):
        lightning_trainer(tmp_path, callback).fit(Lit(load(world)), loader())


class TestWhichModule:
    class Two(pl.LightningModule):
        """A model and something else that has parameters."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.temperature = net, nn.Linear(1, 1)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.net)

    def fit(self, world: Path, folder: Path, module: pl.LightningModule, **changes: Any) -> Any:
        callback = MergeReadyCallback(**options(world, probe=None, **changes))
        lightning_trainer(folder, callback, max_steps=1).fit(module, loader())
        return callback.monitor.live.model

    def test_the_named_one(self, world: Path, tmp_path: Path) -> None:
        module = self.Two(load(world))
        assert self.fit(world, tmp_path, module, model="net") is module.net

    def test_the_only_child_with_parameters(self, world: Path, tmp_path: Path) -> None:
        module = Lit(load(world))
        module.loss = nn.CrossEntropyLoss()
        assert self.fit(world, tmp_path, module) is module.net

    def test_else_the_lightning_module(self, world: Path, tmp_path: Path) -> None:
        module = self.Two(load(world))
        assert self.fit(world, tmp_path, module, base=None) is module

    def test_a_name_that_is_not_there(self, world: Path, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"`model` is 'encoder', but Two has only the modules .*net"):
            self.fit(world, tmp_path, self.Two(load(world)), model="encoder")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="peer"):
        MergeReadyCallback(peer=[])  # type: ignore[call-arg]


def test_stopped_runs_end_with_a_summary(world: Path, tmp_path: Path) -> None:
    callback = MergeReadyCallback(
        **options(world, probe=None, stop=NormBudget(max_norm=1e-9)), folder=tmp_path / "elsewhere"
    )
    trainer = lightning_trainer(tmp_path, callback)
    trainer.fit(Lit(load(world)), loader())
    assert trainer.global_step == 1
    assert (tmp_path / "elsewhere/summary.json").exists()
    assert not (tmp_path / "mergeready").exists()
