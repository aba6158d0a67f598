"""The transformers shell under DDP and FSDP2: every rank's Trainer is given the callback, and all see one history."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready import Decision, History, Picks, Probe, Schedule, read_history
from mergeready.weights import SafetensorsFolder
from mergeready.weights.ranks import Ranks
from tests.models import perturb, tiny_bert
from tests.ranks import run_ranks
from tests.sharded import force_fsdp_on_cpu
from tests.trainers import make_trainer

pytestmark = pytest.mark.slow


class Killed(Exception):
    pass


def prepare_rank(layout: str) -> dict[str, Any]:
    # What accelerate asks for, though the group is made already.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    if layout == "ddp":
        return {}
    force_fsdp_on_cpu()
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}


def trained(
    layout: str,
    folder: Path,
    out: Path,
    probed: bool = True,
    stop_at: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    settings = prepare_rank(layout)
    from transformers import TrainerCallback

    from mergeready.transformers import MergeReadyCallback

    class KillAt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                raise Killed

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, **settings}
    callback = MergeReadyCallback(
        base=folder / "base",
        peers=[folder / "peer"],
        probe=Probe(merge="ties", max_evaluations=4, schedule=Schedule(every=3)),
        measure=Schedule(every=2),
        picks=Picks(),
    )
    trainer = make_trainer(out, *([callback] if probed else []), KillAt(), **options)
    try:
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4") if resume else None)
    except Killed:
        return {}
    state = trainer.accelerator.get_state_dict(trainer.model)
    history = callback.monitor.state_dict()["history"] if probed else []
    logged = [entry for entry in trainer.state.log_history if "mergeready/norm" in entry]
    return {"state": state, "history": history, "logged": len(logged), "size": Ranks.world().size}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    tiny_bert().save_pretrained(path / "base")
    perturb(tiny_bert(), seed=3).save_pretrained(path / "peer")
    return path


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_run_killed_and_resumed_equals_one_that_was_not(layout: str, folder: Path, tmp_path: Path) -> None:
    whole = run_ranks(trained, 2, layout, folder, tmp_path / "whole", sharing=layout == "fsdp2")
    plain = run_ranks(trained, 2, layout, folder, tmp_path / "plain", False)
    run_ranks(trained, 2, layout, folder, tmp_path / "cut", True, 7)
    resumed = run_ranks(trained, 2, layout, folder, tmp_path / "cut", True, None, True)
    assert [found["size"] for found in whole] == [2, 2]
    assert whole[0]["history"] == whole[1]["history"] == resumed[0]["history"] == resumed[1]["history"]
    assert [r["step"] for r in whole[0]["history"] if r["kind"] == "probe"] == [1, 2, 3, 6, 9, 10]
    assert whole[0]["logged"] > 0
    for name, value in whole[0]["state"].items():
        assert torch.equal(value, plain[0]["state"][name]), name
        assert torch.equal(value, resumed[0]["state"][name]), name
    files = [(tmp_path / run / "mergeready" / "history.jsonl").read_text() for run in ("whole", "cut")]
    assert files[0] == files[1]
    picks = json.loads((tmp_path / "whole" / "mergeready" / "picks" / "picks.json").read_text())
    for pick in picks.values():
        stored = SafetensorsFolder(tmp_path / "whole" / "mergeready" / "picks" / pick["folder"])
        assert set(stored.infos) == set(SafetensorsFolder(folder / "base").infos)
        config = json.loads((stored.path / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert (stored.path / "mergeready-report.json").is_file() == (layout == "fsdp2")


class OnOneRank:
    """A policy that looks at something of its own, as a clock is, and wants to stop on the second rank only."""

    def __call__(self, history: History) -> Decision:
        return Decision(Ranks.world().rank == 1 and history[-1].step >= 4, "enough")


def stopping(layout: str, folder: Path, out: Path) -> tuple[int, list[tuple[int, str]], bool]:
    settings = prepare_rank(layout)
    from mergeready.transformers import MergeReadyCallback

    callback = MergeReadyCallback(base=folder / "base", measure=Schedule(every=2), stop=OnOneRank())
    trainer = make_trainer(out, callback, max_steps=10, **settings)
    trainer.train()
    decisions = [(record.step, record.reason) for record in callback.history.decisions]
    return trainer.state.global_step, decisions, trainer.control.should_training_stop


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_pitfall_control_is_not_shared_between_ranks(layout: str, folder: Path, tmp_path: Path) -> None:
    """A stop that one rank decides ends both at the same step, with a checkpoint of it."""
    assert run_ranks(stopping, 2, layout, folder, tmp_path) == [(4, [(4, "enough")], True)] * 2
    assert [record.step for record in read_history(tmp_path / "mergeready/history.jsonl").metrics] == [
        1,
        2,
        4,
    ]
    assert (tmp_path / "checkpoint-4/trainer_state.json").is_file()


def loaded_on_the_first_rank_only(folder: Path, out: Path) -> list[float]:
    settings = prepare_rank("fsdp2")
    from mergeready.transformers import MergeReadyCallback

    settings["fsdp_config"]["cpu_ram_efficient_loading"] = True
    model = tiny_bert()
    if Ranks.world().rank == 1:
        perturb(model, seed=5, scale=10.0)
    callback = MergeReadyCallback(base=folder / "base", measure=Schedule(every=1), picks=None)
    make_trainer(out, callback, model=model, max_steps=2, learning_rate=1e-6, **settings).train()
    return [record.relative_norm for record in callback.history.metrics]


def test_pitfall_ranks_hold_anything_before_fsdp2_hands_out_the_weights(folder: Path, tmp_path: Path) -> None:
    """With `cpu_ram_efficient_loading`, others than the first get theirs in `prepare`."""
    first, second = run_ranks(loaded_on_the_first_rank_only, 2, folder, tmp_path)
    assert first == second
    assert all(0 < norm < 1e-4 for norm in first)
