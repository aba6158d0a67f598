from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mergeready.errors import (
    BaseMismatchError,
    MismatchError,
    NonFiniteError,
    NotTrainedError,
    OptionError,
)
from mergeready.experts import Base, dense
from mergeready.training.peers import OpenPeer, Peer, open_peers, require_own_names, require_reachable
from tests.training.small import Evaluation, Net, expert, state_of


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.open(Net())


def open_one(peer: object, base: Base) -> OpenPeer:
    [opened] = open_peers([peer], base)
    return opened


def test_a_peer_is_its_difference_to_the_base(base: Base) -> None:
    state, start = state_of(expert(1)), state_of(Net())
    peer = open_one(Peer(state, name="law"), base)
    assert set(peer) == set(start)
    squares = 0.0
    for name in start:
        exact = state[name].double() - start[name].double()
        torch.testing.assert_close(dense(peer[name]).double(), exact, rtol=1e-5, atol=1e-7)
        squares += float(exact.square().sum())
    assert peer.norm == pytest.approx(squares**0.5, rel=1e-6)


def test_what_a_peer_did_not_change_is_left_out(base: Base) -> None:
    state = state_of(Net())
    state["head.bias"] += 1
    peer = open_one(state, base)
    assert list(peer) == ["head.bias"]
    assert "embed.weight" not in peer
    with pytest.raises(KeyError):
        peer["embed.weight"]
    assert peer.norm == pytest.approx(3**0.5)


def test_names_and_evaluations(base: Base) -> None:
    evaluate = Evaluation(1)
    law, code, plain = open_peers(
        [Peer(expert(1), evaluate, "law"), Peer(expert(2), name="code"), state_of(expert(3))], base
    )
    assert (law.label, law.evaluate) == ("law", evaluate)
    assert (code.label, code.evaluate) == ("code", None)
    assert (plain.label, plain.evaluate) == ("state dict", None)


def test_its_own_head_and_what_it_lacks_are_logged(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(expert(1))
    state["own_head.weight"] = torch.ones(2, 2)
    del state["norm.bias"]
    with caplog.at_level(logging.WARNING, "mergeready"):
        peer = open_one(Peer(state, name="law"), base)
    assert caplog.messages == [
        "peer law: not merged, since the base lacks them: own_head.weight",
        "peer law: counted as unchanged, since it lacks them: norm.bias",
    ]
    assert "own_head.weight" not in peer
    assert "norm.bias" not in peer


def test_the_base_itself_is_no_peer(base: Base) -> None:
    with pytest.raises(NotTrainedError, match="peer law is the base itself"):
        open_peers([Peer(Net(), name="law")], base)


def test_another_initialisation_is_no_peer(base: Base) -> None:
    with pytest.raises(BaseMismatchError, match="does not descend from"):
        open_peers([Net(seed=5)], base)


def test_nan(base: Base) -> None:
    state = state_of(expert(1))
    state["head.bias"][1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite values in head\.bias"):
        open_peers([state], base)


def test_equal_names(base: Base) -> None:
    with pytest.raises(OptionError, match="several peers, or a peer and this run, are called law; give them"):
        require_own_names(open_peers([Peer(expert(1), name="law"), Peer(expert(2), name="law")], base))


def test_a_peer_cannot_be_called_as_the_run_itself(base: Base) -> None:
    with pytest.raises(OptionError, match="are called own; give them names"):
        require_own_names(open_peers([Peer(expert(1), name="own")], base))


def test_a_peer_must_change_something_that_the_model_has(base: Base) -> None:
    state = state_of(Net())
    state["head.bias"] += 1
    peers = open_peers([Peer(state, name="law")], base)
    require_reachable(peers, ["head.bias", "embed.weight"])
    with pytest.raises(MismatchError, match=r"peer law changes no parameter of the model: head\.bias"):
        require_reachable(peers, ["embed.weight"])


def test_a_module_as_peer(base: Base) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = expert(1)

    assert set(open_one(Renamed(), base)) == set(state_of(Net()))
