"""Techniques inside transformers' Trainer and Lightning's: accumulation, resuming, and what an exception leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mergeready.lightning
from mergeready import DriftPenalty, SharpnessAware, SimulatedMerge, WeightAverage
from mergeready.errors import OptionError, UnsupportedError
from mergeready.transformers import MergeReadyCallback
from tests.loops import Lit, lightning_trainer, load, loader, make_world
from tests.trainers import make_trainer, weights_of

STEADY: dict[str, Any] = {
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "learning_rate": 0.05,
    "train_sampling_strategy": "sequential",
    "max_steps": 6,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def callback(world: Path, *techniques: Any) -> MergeReadyCallback:
    return MergeReadyCallback(base=world / "base", picks=None, techniques=techniques)


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("technique", [DriftPenalty(strength=0.5), SimulatedMerge(every=2, noise=0.01)])
def test_accumulated_steps_are_those_of_whole_batches(world: Path, tmp_path: Path, technique: Any) -> None:
    """Also where gradients are clipped, which happens after techniques have had their say."""
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = load(world)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        own = callback(world, technique)
        trainer = make_trainer(tmp_path / str(size), own, model=model, **STEADY, **changes)
        trainer.compute_loss_func = summed
        trainer.train()
        found.append(weights_of(model))
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-5) for key in found[0])


def test_switched_off_the_trainer_keeps_its_own_step(world: Path, tmp_path: Path) -> None:
    ends = []
    for techniques in ([], [DriftPenalty(strength=0)]):
        model = load(world)
        trainer = make_trainer(
            tmp_path / str(len(techniques)), callback(world, *techniques), model=model, **STEADY
        )
        trainer.train()
        ends.append(weights_of(model))
        assert "training_step" not in vars(trainer)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_resumed_with_the_average_it_had(world: Path, tmp_path: Path) -> None:
    changes = STEADY | {"save_strategy": "steps", "save_steps": 3}
    techniques = [WeightAverage(decay=0.5), SimulatedMerge(every=2)]
    models = [load(world), load(world)]
    make_trainer(tmp_path, callback(world, *techniques), model=models[0], **changes).train()
    again = make_trainer(tmp_path, callback(world, *techniques), model=models[1], **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    first, second = map(weights_of, models)
    assert all(torch.equal(first[key], second[key]) for key in first)


class Broken(nn.Module):
    """Raises at the third pass, while the weights are moved; notes them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes = net, 0
        net.register_forward_pre_hook(lambda *_: self.note())
        self.seen: dict[str, Any] = {}

    def note(self) -> None:
        self.passes += 1
        if self.passes == 3:
            self.seen = weights_of(self.net)
            raise RuntimeError("out of memory")


def test_an_exception_in_forward_leaves_the_weights_as_they_were(world: Path, tmp_path: Path) -> None:
    for shell in ("transformers", "lightning"):
        model = load(world)
        broken = Broken(model)
        before: list[Any] = []
        technique = SimulatedMerge(every=3, noise=0.01)
        if shell == "transformers":
            trainer = make_trainer(tmp_path / shell, callback(world, technique), model=model, **STEADY)
            run: Any = trainer.train
            trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer = trainer.optimizer
        else:
            own = mergeready.lightning.MergeReadyCallback(
                base=world / "base", picks=None, techniques=[technique]
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            lit = Lit(model)
            lit.configure_optimizers = lambda optimizer=optimizer: optimizer  # type: ignore[method-assign]
            trainer = lightning_trainer(tmp_path / shell, own)
            run = lambda trainer=trainer, lit=lit: trainer.fit(lit, loader())  # noqa: E731
        optimizer.register_step_post_hook(
            lambda *_, model=model, before=before: before.append(weights_of(model))
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        after = weights_of(model)
        assert len(before) == 2
        assert all(torch.equal(after[key], before[-1][key]) for key in after)
        assert not all(torch.equal(broken.seen[key], after[key]) for key in after)


def test_two_passes_are_refused_by_lightning(world: Path, tmp_path: Path) -> None:
    own = mergeready.lightning.MergeReadyCallback(
        base=world / "base", picks=None, techniques=[SharpnessAware()]
    )
    with pytest.raises(UnsupportedError, match="sharpness_aware needs two passes"):
        lightning_trainer(tmp_path, own).fit(Lit(load(world)), loader())
    assert not (tmp_path / "mergeready").exists()


def test_an_average_does_not_overwrite_the_best_checkpoint(world: Path, tmp_path: Path) -> None:
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }
    best |= {"eval_steps": 3, "save_steps": 3, "metric_for_best_model": "accuracy"}
    trainer = make_trainer(tmp_path, callback(world, WeightAverage()), model=load(world), **(STEADY | best))
    with pytest.raises(OptionError, match="weight_average sets the weights at the end of training"):
        trainer.train()
    assert not (tmp_path / "mergeready").exists()
    make_trainer(tmp_path, callback(world, DriftPenalty()), model=load(world), **(STEADY | best)).train()
