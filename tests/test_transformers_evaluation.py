"""The Trainer's own evaluation, where it serves the probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from mergeready import Probe, Schedule
from mergeready.transformers import MergeReadyCallback
from tests.loops import load, make_world
from tests.trainers import Tokens, accuracy, arguments, make_trainer, weights_of
from tests.training.averaging import Averaging

OFTEN = Schedule(every=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", None), ("loss", "accuracy"), ("accuracy", "loss"), (None, "loss")]
)
def test_the_probe_s_metric_is_its_own(
    world: Path, tmp_path: Path, metric: str | None, best: str | None
) -> None:
    """Whatever chooses the Trainer's best model."""
    callback = MergeReadyCallback(
        base=world / "base", peers=[world / "peer-1"], probe=Probe(metric=metric, schedule=OFTEN)
    )
    changes: dict[str, Any] = (
        {}
        if best is None
        else {
            "metric_for_best_model": best,
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "save_steps": 4,
        }
    )
    trainer = make_trainer(tmp_path, callback, model=load(world), **changes, max_steps=4)
    trainer.train()
    assert callback.history.start is not None
    assert callback.history.start.metric == (metric or best)
    losses = callback.history.start.metric == "loss"
    assert (callback.history.probes[0].expert.n is None) == losses


class Counting(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.full((5,), index + 3), "labels": torch.full((4,), index + 2)}


def test_generation_is_evaluated_as_the_trainer_is_configured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model.generation_config.suppress_tokens = [0, 1]  # so that nothing but the limit ends a sequence
    probe = Probe(merge="ties", scales=(0.5,), max_evaluations=1, schedule=OFTEN)
    callback = MergeReadyCallback(probe=probe, picks=None)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        predict_with_generate=True,
        generation_max_length=7,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=Counting(),
        eval_dataset=Counting(),
        compute_metrics=lambda found: {"length": float((found.predictions > 0).sum(1).mean())},
        callbacks=[callback],
    )
    trainer.train()
    expected = trainer.evaluate()["eval_length"]
    start = callback.history.start
    assert start is not None
    assert start.references == {"own": {"base": expected}}
    assert {record.expert.value for record in callback.history.probes} == {expected}


def test_an_optimizer_that_puts_other_weights_into_the_model_for_evaluations(
    world: Path, tmp_path: Path
) -> None:
    """It must not do so while merged weights are there, as where a run is resumed that was saved while it trained."""

    def run(callbacks: list[Any], *, steps: int, resume: str | None = None) -> Any:
        model = load(world)
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=3),
            train_dataset=Tokens(),
            eval_dataset=Tokens(24, seed=1),
            compute_metrics=accuracy,
            callbacks=callbacks,
            optimizers=(Averaging(model.parameters(), lr=0.05), None),
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.optimizer.eval()
        return weights_of(model)

    run([], steps=3)
    checkpoint = str(tmp_path / "checkpoint-3")
    plain = run([], steps=8, resume=checkpoint)
    callback = MergeReadyCallback(
        base=world / "base", peers=[world / "peer-1"], probe=Probe(schedule=OFTEN), picks=None
    )
    watched = run([callback], steps=8, resume=checkpoint)
    assert callback.history.probes
    for name, value in plain.items():
        assert torch.equal(watched[name], value)
