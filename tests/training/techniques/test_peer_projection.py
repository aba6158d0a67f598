"""After every step nothing of the task vector lies where peers' does; adapters as whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from mergeready.errors import MismatchError, OptionError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.techniques.lora_start import SharedLoraA
from mergeready.training.techniques.peer_projection import PeerProjection
from tests.models import perturb
from tests.sharded import adapter
from tests.training.small import Net, expert
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


@pytest.mark.parametrize("sides", ["right", "left"])
@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
def test_adapters_whose_change_is_transposed(kind: str, sides: str) -> None:
    """Of square matrices too, where the wrong side would fit."""

    def layer() -> Any:
        torch.manual_seed(0)
        return Conv1D(12, 12) if kind == "conv1d" else torch.nn.Embedding(12, 12)

    base = torch.nn.Sequential(layer())
    peer = perturb(torch.nn.Sequential(layer()), 1, 0.005)
    options = LoraConfig(r=3, target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    model = perturb(get_peft_model(torch.nn.Sequential(layer()), options), 2, 0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    chosen = started([PeerProjection(rank=2, sides=sides)], model, peers=[peer], optimizer=optimizer)
    x = torch.arange(12) if kind == "embedding" else torch.eye(12)
    train(chosen, model, optimizer, 1, 2, loss=lambda m, *_: m(x).square().sum())
    D = deltas_of(model, None)["0.weight"].double()
    U, _, V = torch.linalg.svd((peer.state_dict()["0.weight"] - base.state_dict()["0.weight"]).double())
    left = D @ V[:2].T if sides == "right" else U[:, :2].T @ D
    assert float(left.norm()) < 1e-4 * float(D.norm())
    assert float(D.norm()) > 1e-3


def test_of_a_sketch_the_leading_vectors_count() -> None:
    """As many as of peers with weights. Of 64 columns a sketch says all."""
    torch.manual_seed(0)
    base, peer = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
    opened = Base.open(base.state_dict())
    basis = torch.linalg.qr(torch.randn(64, 2)).Q
    with torch.no_grad():
        peer.weight.copy_(base.weight + torch.randn(64, 2) * torch.tensor([0.05, 0.01]) @ basis.T)
    sketch = take_fingerprint(open_expert(peer.state_dict(), opened).vector, opened, label="peer")
    V = torch.linalg.svd((peer.weight - base.weight).detach().double())[2]
    model = torch.nn.Linear(64, 64, bias=False)
    model.load_state_dict(base.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    chosen = started([PeerProjection(rank=1)], model, base.state_dict(), peers=[sketch], optimizer=optimizer)
    for _ in chosen.passes():
        (model.weight @ V[:2].T.float()).sum().backward()
    optimizer.step()
    seen = ((model.weight - base.weight).detach().double() @ V[:2].T).norm(dim=0)
    assert float(seen[0]) < 1e-3 * float(seen[1])


def test_what_does_not_serve_is_refused() -> None:
    model = net()
    with pytest.raises(OptionError, match="needs `peers`"):
        started([PeerProjection()], model, Net(), optimizer=adamw(model))
    for rank in (6, 16):  # all six inputs of the first layer
        with pytest.raises(MismatchError, match=r"nothing to train in .*embed\.weight"):
            started([PeerProjection(rank=rank)], model, Net(), peers=[expert(2)], optimizer=adamw(model))
    with pytest.raises(OptionError, match="optimizer"):
        started([PeerProjection(rank=1)], model, Net(), peers=[expert(2)])
    with pytest.raises(OptionError, match="`sides`"):
        PeerProjection(sides="both")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`rank`"):
        PeerProjection(rank=0)


def test_a_shared_a_is_not_projected() -> None:
    """It would be shared no more."""
    model = adapter(net())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    both = [SharedLoraA(), PeerProjection(rank=1)]
    with pytest.raises(OptionError, match=r"frozen, as a shared A is: .*layers\.0\.weight"):
        started(both, model, peers=[expert(2)], optimizer=adamw(model))
    started(
        [SharedLoraA(), PeerProjection(rank=1, sides="left")],
        model,
        peers=[expert(2)],
        optimizer=adamw(model),
    )
