"""Techniques inside transformers' Trainer and Lightning's: accumulation, resuming, and what an exception leaves."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

import mergeready.lightning
from mergeready import (
    DriftPenalty,
    NormGovernor,
    Probe,
    Schedule,
    SharpnessAware,
    SimulatedMerge,
    WeightAverage,
)
from mergeready.errors import OptionError
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


@pytest.mark.parametrize(
    "technique",
    [DriftPenalty(strength=0.5), SimulatedMerge(every=2, noise=0.01), SharpnessAware(radius=0.1)],
    ids=lambda technique: technique.name,
)
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


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_what_was_interrupted_does_not_steer_the_next_run(world: Path, tmp_path: Path) -> None:
    """The Trainer keeps its optimizer; the callback may have been taken off."""
    model, start = load(world), load(world)
    own = callback(world, NormGovernor(max_norm=1e-3), DriftPenalty(strength=0.5))
    trainer = make_trainer(tmp_path / "first", own, Interrupt(), model=model, **STEADY)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    free = make_trainer(tmp_path / "free", model=start, **STEADY)
    start.load_state_dict(model.state_dict())
    for one in (own, Interrupt):
        trainer.remove_callback(one)
    trainer.train()
    free.train()
    after, expected = weights_of(model), weights_of(start)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("folder", ["first", "second"])
def test_resumed_with_the_average_it_had(world: Path, tmp_path: Path, folder: str) -> None:
    """Also where the checkpoint is of another run's folder."""
    changes = STEADY | {"save_strategy": "steps", "save_steps": 3}
    techniques = [WeightAverage(decay=0.5), SimulatedMerge(every=2)]
    models = [load(world), load(world)]
    make_trainer(tmp_path / "first", callback(world, *techniques), model=models[0], **changes).train()
    again = make_trainer(tmp_path / folder, callback(world, *techniques), model=models[1], **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-3"))
    first, second = map(weights_of, models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_picks_stay_until_the_checkpoint_has_its_average(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed there is resumed from the checkpoint before, whose picks these are."""
    scores = iter([0.0, 1.0, 0.5, 2.0, 0.6])  # the base, and at each probe the expert and a merge
    probe = Probe(
        evaluate=lambda model: {"score": next(scores)},
        scales=(0.5,),
        max_evaluations=1,
        schedule=Schedule(every=1),
    )
    own = MergeReadyCallback(
        base=world / "base", peers=[world / "peer-1"], probe=probe, techniques=[WeightAverage()]
    )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergeready.transformers.callback.save_file", killed)
    changes = STEADY | {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, own, model=load(world), **changes)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert own.history.probes[-1].step == 2
    picks = tmp_path / "mergeready/picks"
    assert sorted(path.name for path in picks.glob("step-*")) == ["step-000001", "step-000002"]


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


class Logs(Lit):
    """Counts its passes and what it logs, with an optimizer like the Trainer's above."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.passes = self.logged = 0

    def log(self, *args: Any, **named: Any) -> None:
        self.logged += 1
        super().log(*args, **named)

    def training_step(self, batch: dict[str, Any], index: int) -> Any:
        self.passes += 1
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def fitted(world: Path, folder: Path, size: int, accumulated: int, **changes: Any) -> Logs:
    lit = Logs(load(world))
    own = mergeready.lightning.MergeReadyCallback(
        base=world / "base", picks=None, techniques=[SharpnessAware(radius=0.1)]
    )
    trainer = lightning_trainer(
        folder, own, accumulate_grad_batches=accumulated, max_steps=6, gradient_clip_val=0.5, **changes
    )
    trainer.fit(lit, loader(size))
    return lit


def test_lightning_runs_a_step_s_batches_twice_where_the_gradient_is_wanted_first(
    world: Path, tmp_path: Path
) -> None:
    """And as the Trainer does it; what is logged in the second pass does not count."""
    whole, parts = fitted(world, tmp_path / "1", 8, 1), fitted(world, tmp_path / "4", 2, 4)
    assert (whole.passes, parts.passes) == (12, 48)
    assert (whole.logged, parts.logged) == (6, 24)
    model = load(world)
    trainer = make_trainer(tmp_path, callback(world, SharpnessAware(radius=0.1)), model=model, **STEADY)
    trainer.compute_loss_func = summed
    trainer.train()
    expected = weights_of(model)
    for lit in (whole, parts):
        found = weights_of(lit.net)
        assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())


class Skipping(Lit):
    def training_step(self, batch: dict[str, Any], index: int) -> Any:  # type: ignore[override]
        found = super().training_step(batch, index)
        return None if index % 2 else found


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning_has_its_weights_back_after_a_batch_that_is_skipped(
    world: Path, tmp_path: Path, accumulated: int
) -> None:
    """By returning None: neither backward nor its events come then."""
    found = []
    for moved in (False, True):
        model = load(world)
        # Moved weights give other gradients, but here a step is one of a fixed size.
        technique = SimulatedMerge(every=1, scale=(1.0, 1.0), drop=0.0, noise=0.01)
        own = mergeready.lightning.MergeReadyCallback(
            base=world / "base",
            picks=None,
            techniques=[technique] if moved else [],
            measure=Schedule(every=1),
        )
        lit = Skipping(model)
        lit.configure_optimizers = lambda model=model: Signs(model.parameters(), lr=1e-4)  # type: ignore[method-assign]
        trainer = lightning_trainer(
            tmp_path / str(moved), own, max_steps=4, accumulate_grad_batches=accumulated
        )
        trainer.fit(lit, loader())
        found.append([record.norm for record in own.history.metrics])
    assert found[1] == pytest.approx(found[0], rel=0.1)


class Ending(Lit):
    """Ends its epoch at the third batch, by returning -1."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


def test_lightning_has_its_weights_back_at_the_end_of_an_epoch_that_is_cut_short(
    world: Path, tmp_path: Path
) -> None:
    """Where checkpoints of epochs are saved."""
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(weights_of(module.net))

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(weights_of(module.net))

    own = mergeready.lightning.MergeReadyCallback(
        base=world / "base", picks=None, techniques=[SimulatedMerge(every=1, noise=0.05)]
    )
    trainer = lightning_trainer(tmp_path, own, Look(), max_steps=-1, max_epochs=1)
    trainer.fit(Ending(load(world)), loader())
    assert len(seen) == 3
    assert all(torch.equal(seen[2][key], value) for key, value in seen[1].items())


class Signs(torch.optim.SGD):
    """Each gradient counts as 1, whatever it is."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.fill_(1.0)
        super().step()
        return loss


def test_lightning_climbs_with_scaled_gradients_as_without(world: Path, tmp_path: Path) -> None:
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision.forward_context = nullcontext  # type: ignore[method-assign]
    scaled = fitted(world, tmp_path / "1", 4, 2, plugins=[precision])
    plain = fitted(world, tmp_path / "2", 4, 2)
    found, expected = weights_of(scaled.net), weights_of(plain.net)
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())


@pytest.mark.parametrize("shell", ["transformers", "lightning"])
def test_an_exception_in_the_second_pass_leaves_the_weights_as_they_were(
    world: Path, tmp_path: Path, shell: str
) -> None:
    model = load(world)
    broken, before = Broken(model), weights_of(model)
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    if shell == "transformers":
        trainer = make_trainer(
            tmp_path, callback(world, SharpnessAware(radius=0.1)), model=model, **(STEADY | changes)
        )
        run: Any = trainer.train
    else:
        own = mergeready.lightning.MergeReadyCallback(
            base=world / "base", picks=None, techniques=[SharpnessAware(radius=0.1)]
        )
        fit = lightning_trainer(tmp_path, own, accumulate_grad_batches=2)
        run = lambda: fit.fit(Lit(model), loader(4))  # noqa: E731
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    after = weights_of(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not all(torch.equal(broken.seen[key], value) for key, value in before.items())


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
