"""After every step nothing of the task vector lies where peers' does; adapters as whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergeready.errors import MismatchError, OptionError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.techniques.lora_overlap import LoraOverlap
from mergeready.training.techniques.peer_projection import PeerProjection
from tests.sharded import adapter
from tests.training.small import Net, equal, expert, state_of
from tests.training.techniques.drive import adamw, net, started, train


def deltas_of(model: Any, base: Any) -> dict[str, torch.Tensor]:
    live = LiveExpert(model, base)
    return {n: live.vector.flat(n, 0, i.numel).reshape(i.shape) for n, i in live.vector.infos.items()}


@pytest.mark.parametrize("sides", ["right", "left", "either"])
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_nothing_is_left_in_the_peers_subspaces(sides: str, kind: str) -> None:
    model: Any = net() if kind == "whole" else adapter(net())
    optimizer = adamw(model)
    base = Net() if kind == "whole" else None
    peers = [expert(2), expert(3)]
    chosen = started([PeerProjection(rank=1, sides=sides)], model, base, peers=peers, optimizer=optimizer)
    train(chosen, model, optimizer, 1, 5)
    found = deltas_of(model, base)
    matrices = [name for name, delta in found.items() if delta.ndim == 2]
    assert matrices
    for name in matrices:
        D = found[name].double()
        assert float(D.norm()) > 1e-3
        for peer in peers:
            U, _, V = torch.linalg.svd((peer.state_dict()[name] - Net().state_dict()[name]).double())
            if sides != "left":
                assert float((D @ V[0]).norm()) < 1e-4 * float(D.norm())
            if sides != "right":
                assert float((U[:, 0] @ D).norm()) < 1e-4 * float(D.norm())


def test_a_fingerprint_helps_as_much_as_its_sketch() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(128, 64, bias=False)
    peer = torch.nn.Linear(128, 64, bias=False)
    direction = torch.nn.functional.normalize(torch.randn(128), dim=0)
    with torch.no_grad():
        peer.weight.copy_(base.weight + torch.outer(0.01 * torch.randn(64), direction))
    opened = Base.open(base.state_dict())
    sketch = take_fingerprint(open_expert(peer.state_dict(), opened).vector, opened, label="peer")
    model = torch.nn.Linear(128, 64, bias=False)
    model.load_state_dict(base.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    chosen = started([PeerProjection(rank=1)], model, base.state_dict(), peers=[sketch], optimizer=optimizer)
    for _ in chosen.passes():
        (model(direction) ** 2).sum().backward()
    optimizer.step()
    D = model.weight.detach() - base.weight.detach()
    plain = torch.autograd.grad((base(direction) ** 2).sum(), base.weight)[0]
    left = float((D @ direction).norm() / (plain @ direction).norm())
    assert left == pytest.approx(1 - 64 / 128, abs=0.2)


def test_what_does_not_serve_is_refused() -> None:
    model = net()
    with pytest.raises(OptionError, match="needs `peers`"):
        started([PeerProjection()], model, Net(), optimizer=adamw(model))
    with pytest.raises(MismatchError, match=r"nothing to train in .*embed\.weight"):
        started([PeerProjection(rank=16)], model, Net(), peers=[expert(2)], optimizer=adamw(model))
    with pytest.raises(OptionError, match="optimizer"):
        started([PeerProjection(rank=1)], model, Net(), peers=[expert(2)])
    with pytest.raises(OptionError, match="`sides`"):
        PeerProjection(sides="both")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`rank`"):
        PeerProjection(rank=0)


def test_the_overlap_with_peers_adapters_shrinks() -> None:
    peer = adapter(net())
    optimizer = adamw(peer)
    train(started([], peer), peer, optimizer, 1, 4)
    other = peer.merge_and_unload()
    found = []
    for strength in (0.0, 0.5):
        model = adapter(net())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        chosen = started([LoraOverlap(strength=strength)], model, peers=[other], optimizer=optimizer)
        train(chosen, model, optimizer, 1, 20)
        name = "layers.0.weight"
        D = (other.state_dict()[name] - Net().state_dict()[name]).double()
        V = torch.linalg.svd(D)[2][:4]
        A = next(p for n, p in model.named_parameters() if "layers.0.lora_A" in n).detach().double()
        found.append(float((A @ V.T).abs().sum()))
        if strength == 0:
            plain = adapter(net())
            optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.02)
            train(started([], plain), plain, optimizer, 1, 20)
            assert equal(state_of(plain), state_of(model))
    assert found[1] < 0.5 * found[0]
