"""Behaviour and composition on a small task: what a trained, an untrained and a harmful expert are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergeready.errors import OptionError
from mergeready.experts import Base, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.validation import Evaluation, Report, Verdict, validate
from mergeready.validation.evaluation import load_evaluation
from tests.training import small
from tests.training.small import Net, examples, expert, state_of


def write(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file(state_of(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "net"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write(root / "base", Net())
    for task in range(3):
        write(root / f"task-{task}", expert(task, steps=60))
    return root


def evaluation(task: int = 0, **changes: Any) -> Evaluation:
    return Evaluation(**{"model": Net(), "own": small.Evaluation(task)} | changes)


def neutral(model: nn.Module) -> torch.Tensor:
    return model(examples(7, 99, 50)[0])


def check(world: Path, name: str = "task-0", peers: tuple[str, ...] = (), **changes: Any) -> Report:
    return validate(
        world / name, world / "base", peers=[world / p for p in peers], evaluation=evaluation(**changes)
    )


def verdict(report: Report, name: str) -> Verdict:
    return next(v for v in report.verdicts if v.id == name)


def test_a_trained_expert(world: Path, tmp_path: Path) -> None:
    lenient = tmp_path / "lenient.yaml"  # random linear rules contradict each other more than real tasks do
    lenient.write_text("C402: {retention: 0.01}", encoding="utf-8")
    report = validate(
        world / "task-0",
        world / "base",
        peers=[world / "task-1", world / "task-2"],
        evaluation=evaluation(others={"one": small.Evaluation(1)}),
        thresholds=lenient,
    )
    own = small.Evaluation(0)
    found = verdict(report, "E302")
    assert found.status == "passed"
    assert found.value == pytest.approx(own.mean(expert(0, steps=60)) - own.mean(Net()))
    assert verdict(report, "C402").status == "passed", verdict(report, "C402").message
    assert all(verdict(report, name).value is not None for name in ("C401", "C402", "C403", "C404", "E304"))
    assert report.levels_checked == ["file", "base", "behaviour", "composition"]
    assert report.is_merge_ready
    assert "2 peers" in verdict(report, "C402").message


def test_another_tasks_expert_is_no_better_than_the_base(world: Path) -> None:
    shuffled = small.Evaluation(0)
    shuffled._y = shuffled._y[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    report = check(world, own=shuffled)
    assert verdict(report, "E302").status == "failed"
    assert not report.is_merge_ready or report.failures("warning")


def test_without_peers_surrogates_are_named(world: Path) -> None:
    report = check(world)
    assert verdict(report, "C401").status == "not checked"
    assert "surrogates" in verdict(report, "C402").message
    assert "peers" not in verdict(report, "C402").message


def test_without_an_evaluation_nothing_is_claimed(world: Path) -> None:
    report = validate(world / "task-0", world / "base", peers=[world / "task-1"])
    assert verdict(report, "C401").status == "passed"
    assert verdict(report, "C402").status == "not checked"
    assert not report.is_merge_ready


def test_losses_count_the_other_way_round(world: Path) -> None:
    report = check(world, own=small.Evaluation(0, "loss"))
    found = verdict(report, "E302")
    assert found.status == "passed"
    assert found.value is not None
    assert found.value < 0
    kept = verdict(report, "C402").value  # of made-up peers; how much they leave depends on their draw
    assert kept is not None
    assert kept > 0.05


def test_what_a_worse_expert_keeps_is_not_taken_for_a_gain(world: Path) -> None:
    """Its loss of quality, and what merging adds to it, have one sign: their ratio is no retention."""
    report = check(world, greater_is_better=False)
    assert verdict(report, "E302").status == "failed"
    for name in ("E304", "C402", "C404"):
        assert verdict(report, name).status == "not checked"
        assert verdict(report, name).message == "the expert is no better than its base"
    assert not report.is_merge_ready


def test_diagnostics_alone_call_nothing_merge_ready(world: Path) -> None:
    """An expert that is no better than its base has no gain to keep; that its cosines are fine says nothing."""
    report = check(world, peers=("task-1",), greater_is_better=False)
    assert verdict(report, "C401").status == "passed"
    assert verdict(report, "C402").status == "not checked"
    assert report.levels_checked == ["file", "base", "behaviour", "composition"]
    assert not report.failures("error")
    assert not report.is_merge_ready
    assert report.headline == "Not a verdict on merging: what it keeps when merged was not checked."


def test_an_opponent_is_seen(world: Path, tmp_path: Path) -> None:
    base, own = state_of(Net()), state_of(expert(0, steps=60))
    opposite = Net()
    opposite.load_state_dict({n: 2 * base[n] - t if t.is_floating_point() else t for n, t in own.items()})
    write(tmp_path / "opposite", opposite)
    report = validate(
        world / "task-0", world / "base", peers=[tmp_path / "opposite"], evaluation=evaluation()
    )
    found = verdict(report, "C401")
    assert found.status == "failed"
    assert found.where == ("opposite",)
    assert found.value == pytest.approx(-1.0, abs=1e-3)
    assert verdict(report, "C402").status == "failed"  # the two cancel: nothing is left


def test_fingerprints_stand_for_peers_where_no_weights_are_needed(world: Path, tmp_path: Path) -> None:
    base = Base.open(world / "base")
    made = take_fingerprint(open_expert(world / "task-1", base).vector, base)
    path = made.save(tmp_path / "one.fingerprint.safetensors")
    exact = verdict(check(world, peers=("task-1",)), "C401")
    report = validate(world / "task-0", world / "base", peers=[path], evaluation=evaluation())
    assert verdict(report, "C401").value == pytest.approx(exact.value, abs=1e-6)
    assert "surrogates" in verdict(report, "C402").message


def test_folding(world: Path) -> None:
    own, other = expert(0, steps=60), expert(1, steps=60)
    assert verdict(check(world, outputs=neutral, unfolded=lambda: own), "E301").status == "passed"
    wrong = check(world, outputs=neutral, unfolded=lambda: other)
    assert verdict(wrong, "E301").status == "failed"
    assert verdict(check(world), "E301").status == "not checked"


def test_what_a_user_wrote_may_raise_without_ending_the_report(world: Path) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ImportError("no peft here")

    report = check(world, outputs=broken, unfolded=lambda: expert(0, steps=60))
    assert verdict(report, "E301").message == "could not run: `outputs` raised ImportError: no peft here"
    assert verdict(report, "E302").status == "passed"
    report = check(world, outputs=neutral, unfolded=broken)
    assert verdict(report, "E301").message == "could not run: `unfolded` raised ImportError: no peft here"
    assert verdict(report, "E303").value is not None


def test_outputs_of_two_shapes_are_not_compared(world: Path) -> None:
    sizes = iter((1, 50))
    report = check(
        world, outputs=lambda model: neutral(model)[: next(sizes, 50)], unfolded=lambda: expert(0, steps=60)
    )
    assert "`outputs` has shape (1, " in verdict(report, "E301").message
    assert verdict(report, "E301").status == "not checked"


def test_what_neutral_inputs_say(world: Path) -> None:
    found = verdict(check(world, outputs=neutral), "E303")
    before, after = neutral(Net().eval()).double(), neutral(expert(0, steps=60).eval()).double()
    target = torch.distributions.Categorical(logits=before)
    exact = torch.distributions.kl_divergence(target, torch.distributions.Categorical(logits=after)).mean()
    assert found.value == pytest.approx(float(exact), rel=1e-4)


def test_outputs_that_are_ruled_out_add_nothing(world: Path) -> None:
    def masked(model: nn.Module) -> torch.Tensor:
        logits = neutral(model)
        return torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], dim=1)

    exact = verdict(check(world, outputs=neutral), "E303").value
    assert verdict(check(world, outputs=masked), "E303").value == pytest.approx(exact)


def test_an_expert_that_is_good_only_at_full_scale(world: Path) -> None:
    base, own = state_of(Net())["head.weight"], state_of(expert(0, steps=60))["head.weight"]

    def cliff(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float((model.head.weight - own).norm() < 0.01 * (own - base).norm())}

    found = verdict(check(world, own=cliff), "E304")
    assert found.status == "failed"
    assert found.value == pytest.approx(0.75)


def test_the_model_is_as_it_was(world: Path) -> None:
    model = Net(seed=0)
    before = state_of(model)
    validate(world / "task-0", world / "base", peers=[world / "task-1"], evaluation=evaluation(model=model))
    assert all(torch.equal(t, before[n]) for n, t in state_of(model).items())


def make_evaluation(base: object) -> Evaluation:
    return evaluation(0, metric=str(base))


def test_evaluations_are_named_by_module_and_function() -> None:
    made = load_evaluation("tests.validation.test_behaviour_checks:make_evaluation", "base")
    assert made.metric == "base"
    for target, message in (
        ("nothing", "module:function"),
        ("tests.nowhere:f", "No module named"),
        ("tests.training.small:nothing", "has no nothing"),
        ("tests.training.small:Net", "not an Evaluation"),
    ):
        with pytest.raises(OptionError, match=message):
            load_evaluation(target, 0)
