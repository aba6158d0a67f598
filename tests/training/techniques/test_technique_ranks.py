"""Two ranks that share a batch train as one process that has all of it, under DDP and FSDP2; and can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready import JacobianPenalty, MergeReadyLoop, SparseMask
from mergeready.errors import OptionError, UnsupportedError
from mergeready.weights.shards import local
from tests.ranks import run_ranks
from tests.sharded import full_state, spread
from tests.training.small import Net, examples
from tests.training.techniques.every import CASES
from tests.training.techniques.runs import net, run

pytestmark = pytest.mark.slow

STEPS, HALF = 4, 2
SHARDED = [name for name, case in CASES.items() if case.refused_sharded is None]
RUNS = {
    "ddp": ("ddp", list(CASES)[0::2]),
    "ddp, others": ("ddp", list(CASES)[1::2]),
    "fsdp2": ("fsdp2", SHARDED[0::2]),
    "fsdp2, others": ("fsdp2", SHARDED[1::2]),
    "columns": (
        "columns",
        ["kronecker_filter", "kronecker_penalty", "peer_projection", "sparse_mask, given", "weight_average"],
    ),
}


def on_a_rank(folder: Path, layout: str, names: list[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Each technique's weights at the end, and for which of them a resumed run ends elsewhere."""
    found, astray = {}, []
    for name in names:
        try:
            end, state = trained(folder / f"{name} whole", layout, name, None)
            again, _ = trained(folder / f"{name} resumed", layout, name, state)
        except Exception as error:
            error.add_note(f"with {name}")
            raise
        found[name] = end
        if not all(torch.equal(again[key], value) for key, value in end.items()):
            astray.append(name)
    return found, astray


def trained(
    folder: Path, layout: str, name: str, state: dict[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    case, rank = CASES[name], torch.distributed.get_rank()
    bare = case.model()
    instead = case.before_wrapping if layout == "ddp" else None
    if instead is not None:
        instead(bare)
    model: Any = spread(bare, layout)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, foreach=False
    )
    techniques = [] if instead is not None else [case.technique]
    monitor = MergeReadyLoop(folder, techniques=techniques, **case.arguments)
    if state is not None:
        put_back(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
    monitor.prepare(model, optimizer=optimizer, total_steps=STEPS)
    saved = state or {}
    while monitor.steps < STEPS and not monitor.should_stop:
        x, y = (part.chunk(2)[rank] for part in examples(1, monitor.steps, 16))
        for _ in monitor.passes():
            cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if monitor.steps == HALF and state is None:
            parts = {"optimizer": optimizer.state_dict(), "monitor": monitor.state_dict()}
            saved = copy.deepcopy(parts | {"model": [local(p).clone() for p in model.parameters()]})
    monitor.finish()
    return full_state(model), saved


def put_back(model: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        local(parameter).copy_(value)


@pytest.mark.parametrize("which", RUNS)
def test_two_ranks_agree_with_one_process_and_resume(tmp_path: Path, which: str) -> None:
    layout, names = RUNS[which]
    (first, astray), (second, _) = run_ranks(on_a_rank, 2, tmp_path, layout, names)
    assert not astray
    for name in names:
        case, folder = CASES[name], tmp_path / "alone" / name
        alone = run(folder, [case.technique], model=case.model(), steps=STEPS, **case.arguments)
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
            assert torch.allclose(alone[key], value, atol=3e-6), (name, key)


def refusals(folder: Path) -> dict[str, str]:
    found = {}
    for name, case in CASES.items():
        if case.refused_sharded is None:
            continue
        model: Any = spread(case.model(), "fsdp2")
        monitor = MergeReadyLoop(folder, techniques=[case.technique], **case.arguments)
        with pytest.raises(UnsupportedError) as caught:
            monitor.prepare(model, optimizer=torch.optim.SGD(model.parameters()))
        found[name] = str(caught.value)
    own = examples(torch.distributed.get_rank(), 0, 16)[0]
    for technique in (JacobianPenalty(inputs=[[own]]), SparseMask(batches=[own], rounds=1)):
        model = spread(net(), "ddp")
        monitor = MergeReadyLoop(folder, base=Net().state_dict(), techniques=[technique])
        with pytest.raises(OptionError) as unlike:
            monitor.prepare(model, optimizer=torch.optim.SGD(model.parameters()))
        found[f"{technique.name} with other data on each rank"] = str(unlike.value)
    return found


def test_what_several_ranks_cannot_have_is_refused(tmp_path: Path) -> None:
    for messages in run_ranks(refusals, 2, tmp_path):
        for name, message in messages.items():
            reason = CASES[name].refused_sharded if name in CASES else "differ from rank to rank"
            assert reason is not None
            assert reason in message
