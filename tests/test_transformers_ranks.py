"""The transformers shell under DDP and FSDP2: every rank's Trainer is given the callback, and all see one history."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready import Picks, Probe, Schedule
from mergeready.weights import SafetensorsFolder
from mergeready.weights.ranks import Ranks
from tests.models import perturb, tiny_bert
from tests.ranks import run_ranks
from tests.trainers import make_trainer

pytestmark = pytest.mark.slow


def force_fsdp_on_cpu() -> None:
    """accelerate ignores FSDP on CPU, where its only use is to be tested."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


class Killed(Exception):
    pass


def trained(
    layout: str,
    folder: Path,
    out: Path,
    probed: bool = True,
    stop_at: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    # What accelerate asks for, though the group is made already.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="2")
    from transformers import TrainerCallback

    from mergeready.transformers import MergeReadyCallback

    class KillAt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                raise Killed

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    if layout == "fsdp2":
        force_fsdp_on_cpu()
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
    callback = MergeReadyCallback(
        base=folder / "base",
        peers=[folder / "peer"],
        probe=Probe(merge="ties", schedule=Schedule(every=3)),
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
    whole = run_ranks(trained, 2, layout, folder, tmp_path / "whole")
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
