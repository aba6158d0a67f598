from __future__ import annotations

import pytest
import torch
from torch import nn

from mergeready.errors import EvaluationError
from mergeready.experts import LiveExpert
from mergeready.training.peers import Peer, open_peers
from mergeready.training.references import measure_references
from tests.training.small import Evaluation, Net, equal, expert, state_of


def test_the_base_on_every_task_and_each_peer_on_its_own() -> None:
    own, law, code = (Evaluation(task) for task in (0, 1, 2))
    model, experts = expert(0), {"law": expert(1), "code": expert(2), "silent": expert(3)}
    live = LiveExpert(model, Net())
    peers = open_peers(
        [
            Peer(experts["law"], law, "law"),
            Peer(experts["code"], code, "code"),
            Peer(experts["silent"], name="silent"),
        ],
        live.base,
    )
    before, random = state_of(model), torch.get_rng_state()
    found, metric = measure_references(live, peers, own, None)
    assert equal(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert metric == "accuracy"
    assert {task: set(scores) for task, scores in found.items()} == {
        "own": {"base"},
        "law": {"base", "expert"},
        "code": {"base", "expert"},
    }
    for task, evaluate in {"own": own, "law": law, "code": code}.items():
        assert found[task]["base"].value == evaluate.mean(Net())
        assert found[task]["base"].n == 40
        if task != "own":
            assert found[task]["expert"].value == evaluate.mean(experts[task])
    assert (own.calls, law.calls, code.calls) == (1, 2, 2)


def test_every_task_must_have_the_metric_of_the_own_one() -> None:
    live = LiveExpert(expert(0), Net())
    peers = open_peers([Peer(expert(1), Evaluation(1, "loss"), "law")], live.base)
    with pytest.raises(EvaluationError, match="of law returned no 'accuracy', only loss"):
        measure_references(live, peers, Evaluation(0), None)


def test_the_named_metric() -> None:
    def both(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 0.5, "f1": 0.25}

    live = LiveExpert(expert(0), Net())
    found, metric = measure_references(live, [], both, "f1")
    assert (metric, found["own"]["base"].value) == ("f1", 0.25)
    with pytest.raises(EvaluationError, match="of own returns accuracy, f1: say which one"):
        measure_references(live, [], both, None)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failing_evaluation_leaves_the_model_as_it_was(fails_at: int) -> None:
    calls = 0

    def sometimes(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("lost connection")
        return {"accuracy": 0.5}

    model = expert(0)
    live = LiveExpert(model, Net())
    peers = open_peers([Peer(expert(1), sometimes, "law")], live.base)
    before = state_of(model)
    with pytest.raises(EvaluationError, match="lost connection"):
        measure_references(live, peers, sometimes, None)
    assert equal(before, state_of(model))
    assert model.training
