"""The gradient that keeps an adapter's inputs apart from peers', against the definition, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.techniques.lora_overlap import LoraOverlap
from tests.sharded import adapter
from tests.training.small import Net, equal, expert, state_of
from tests.training.techniques.drive import adamw, net, started, train


def test_the_gradient_is_that_of_the_definition(tmp_path: Path) -> None:
    """A peer that is an adapter counts by its own A, any other by its leading inputs; each of them counts."""
    first: Any = adapter(Net(), seed=5)
    first.save_pretrained(tmp_path / "first")
    second, model = expert(2), adapter(Net())
    technique = LoraOverlap(strength=0.3)
    for _ in started([technique], model, peers=[tmp_path / "first", second]).passes(factor=lambda: 4.0):
        pass
    theirs = dict(first.named_parameters())
    seen = 0
    for name, A in model.named_parameters():
        if "lora_A" not in name:
            assert A.grad is None
            continue
        own = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
        change = (second.state_dict()[own] - Net().state_dict()[own]).double()
        others = [theirs[name].detach().double(), torch.linalg.svd(change)[2][:4]]
        exact = sum((A.detach().double() @ other.T).sign() @ other for other in others)
        torch.testing.assert_close(A.grad.double(), 4.0 * 0.3 * exact, rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen == 3


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="`strength`"):
        LoraOverlap(strength=-1)
    with pytest.raises(OptionError, match="needs `peers`"):
        started([LoraOverlap()], adapter(net()))
    with pytest.raises(UnsupportedError, match="needs a LoRA adapter"):
        started([LoraOverlap()], net(), Net(), peers=[expert(2)])


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
