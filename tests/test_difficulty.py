"""Difficulty as every shell sees it: the same examples, the same numbers, and training as if nobody looked."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from mergeready import Difficulty, DifficultyTable, collate_with_ids, with_example_ids
from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.difficulty.measures import example_measures
from mergeready.transformers import MergeReadyCallback
from tests import loops
from tests.loops import RUNS, STEPS, Crash, Saving, make_world
from tests.models import tiny_bert
from tests.ranks import run_ranks
from tests.trainers import Tokens, arguments, make_trainer, weights_of
from tests.training.small import equal

PLAIN = {"probe": None, "peers": (), "stop": None, "picks": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data loaders whose examples have ids, as users make them."""

    def loader(batch_size: int = 8) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(with_example_ids(Tokens()), batch_size=batch_size, collate_fn=collate_with_ids())

    monkeypatch.setattr(loops, "loader", loader)


def table_in(folder: Path) -> DifficultyTable:
    return DifficultyTable.read(folder / "mergeready" / "difficulty.parquet")


def same(a: DifficultyTable, b: DifficultyTable, tolerance: float = 0.0) -> None:
    for field in fields(DifficultyTable):
        np.testing.assert_allclose(
            getattr(a, field.name), getattr(b, field.name), rtol=tolerance, atol=tolerance, err_msg=field.name
        )


def test_every_shell_sees_the_same(world: Path, marked: None, tmp_path: Path) -> None:
    tables = {}
    for name, run in RUNS.items():
        model = run(world, tmp_path / name, difficulty=True, **PLAIN)
        unwatched = run(world, tmp_path / f"{name}-unwatched", **PLAIN) if name == "transformers" else model
        assert equal(weights_of(model), weights_of(unwatched)), "looking changed the training"
        tables[name] = table_in(tmp_path / name)
    first = tables["plain"]
    assert first.id.tolist() == list(range(64))
    assert first.seen.sum() == STEPS * 8
    for table in tables.values():
        same(table, first, 1e-6)


@pytest.mark.parametrize("shell", ["lightning", "accelerate", "fabric", "plain"])
def test_killed_and_resumed_equals_uninterrupted(
    shell: str, world: Path, marked: None, tmp_path: Path
) -> None:
    RUNS[shell](world, tmp_path / "whole", difficulty=Difficulty(settle_every=4), **PLAIN)
    # At the end of an epoch, where Lightning resumes with the same data.
    every, crash = (8, 9)
    with pytest.raises(Crash):
        RUNS[shell](world, tmp_path / "cut", Saving(every, crash), difficulty=True, **PLAIN)
    RUNS[shell](world, tmp_path / "cut", Saving(every, resume=True), difficulty=True, **PLAIN)
    same(table_in(tmp_path / "cut"), table_in(tmp_path / "whole"))


class Killed(Exception):
    pass


class KillAt(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def tracked(folder: Path, *others: Any, **changes: Any) -> Trainer:
    callback = MergeReadyCallback(difficulty=True, base=tiny_bert().state_dict(), picks=None)
    return make_trainer(folder, callback, *others, **changes)


SAVES = {
    "steps": {"save_strategy": "steps", "save_steps": 5},
    "epoch": {"save_strategy": "epoch"},
    "best": {
        "save_strategy": "best",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "metric_for_best_model": "loss",
    },
}


@pytest.mark.parametrize("saves", SAVES)
def test_a_trainer_killed_and_resumed_equals_uninterrupted(saves: str, tmp_path: Path) -> None:
    """Shuffled, with dropout, whatever event makes the Trainer save."""
    options = SAVES[saves] | {"max_steps": 14}
    tracked(tmp_path / "whole", **options).train()
    with pytest.raises(Killed):
        tracked(tmp_path / "cut", KillAt(10), **options).train()
    tracked(tmp_path / "cut", **options).train(resume_from_checkpoint=True)
    same(table_in(tmp_path / "cut"), table_in(tmp_path / "whole"))


def still(**changes: Any) -> dict[str, Any]:
    """Options under which weights never move, so that each example has one loss that can be known in advance."""
    return {"learning_rate": 0.0, "max_steps": 8, "weight_decay": 0.0} | changes


def still_model() -> nn.Module:
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    return model


def expected(data: Tokens) -> Any:
    whole = data[range(len(data))]
    with torch.no_grad():
        logits = still_model().eval()(**{k: v for k, v in whole.items() if k != "labels"}).logits
    return example_measures(logits, whole["labels"])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("torch", {}),
        ("torch", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("torch", {"label_smoothing_factor": 0.1}),
        ("torch", {"dataloader_num_workers": 2}),
        ("torch", {"remove_unused_columns": False}),
        ("torch", {"bf16": True}),
        # What happens after a batch is put together is the same for both kinds.
        ("datasets", {}),
        ("datasets", {"dataloader_num_workers": 2}),
        ("datasets", {"remove_unused_columns": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "plain"),
)
def test_ids_belong_to_their_examples(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """One shuffled epoch of a model that does not move."""
    data = Tokens()
    given: Any = data
    if kind == "datasets":
        rows = [{**{k: v.tolist() for k, v in data[i].items()}, "note": "unused"} for i in range(len(data))]
        if "remove_unused_columns" in changes:
            rows = [{k: v for k, v in row.items() if k != "note"} for row in rows]
        given = Dataset.from_list(rows)
    callback = MergeReadyCallback(difficulty=True, base=tiny_bert().state_dict(), picks=None)
    trainer = Trainer(
        still_model(),
        arguments(tmp_path, **still(**changes)),
        train_dataset=given,
        eval_dataset=Tokens(24, 1),
        callbacks=[callback],
    )
    trainer.train()
    table, exact = table_in(tmp_path), expected(data)
    assert table.id.tolist() == list(range(64))
    assert (table.seen == 1).all()
    tolerance = 0.1 if "bf16" in changes else 1e-5
    np.testing.assert_allclose(table.loss, exact.loss.numpy(), atol=tolerance)
    np.testing.assert_allclose(table.el2n, exact.el2n.numpy(), atol=tolerance)
    assert "eval_loss" in trainer.evaluate()


def test_what_would_mix_examples_up_is_refused(tmp_path: Path) -> None:
    options = arguments(tmp_path)
    options.packing = True
    callback = MergeReadyCallback(difficulty=True, picks=None)
    with pytest.raises(UnsupportedError, match="`packing` puts several examples into one row"):
        Trainer(tiny_bert(), options, train_dataset=Tokens(), callbacks=[callback])
    with pytest.raises(OptionError, match="needs the Trainer's `train_dataset`"):
        Trainer(tiny_bert(), arguments(tmp_path), callbacks=[MergeReadyCallback(difficulty=True, picks=None)])
    late = make_trainer(tmp_path)
    late.add_callback(MergeReadyCallback(difficulty=True, base=tiny_bert().state_dict(), picks=None))
    with pytest.raises(OptionError, match="was added to it later: pass it in `callbacks`, or call"):
        late.train()


def test_attaching_later_is_in_time(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    MergeReadyCallback(difficulty=True, base=tiny_bert().state_dict(), picks=None).attach(trainer)
    trainer.train()
    assert len(table_in(tmp_path)) == 64


def test_training_without_ids_is_said(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RUNS["plain"](world, tmp_path, difficulty=True, **PLAIN)
    assert "no example's difficulty was seen: give the training `with_example_ids(dataset)`" in caplog.text


def on_a_rank(folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    callback = MergeReadyCallback(difficulty=True, base=tiny_bert().state_dict(), picks=None)
    options = arguments(folder, **still(per_device_train_batch_size=4, save_strategy="steps", save_steps=4))
    Trainer(still_model(), options, train_dataset=Tokens(), callbacks=[callback]).train()


@pytest.mark.slow
def test_two_ranks_see_every_example_once(tmp_path: Path) -> None:
    run_ranks(on_a_rank, 2, tmp_path)
    table, exact = table_in(tmp_path), expected(Tokens())
    assert table.id.tolist() == list(range(64))
    assert (table.seen == 1).all()
    np.testing.assert_allclose(table.loss, exact.loss.numpy(), atol=1e-5)
