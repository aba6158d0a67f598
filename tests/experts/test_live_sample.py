"""Elements of the live task vector that are read alone are those of the whole, however the model is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergeready.errors import UnsupportedError
from mergeready.experts import LiveExpert
from mergeready.experts.coordinates import coordinates
from mergeready.experts.live_sample import LiveSample
from mergeready.weights.ranks import Ranks
from tests.models import perturb
from tests.ranks import run_ranks
from tests.sharded import ON_FOUR, ON_TWO, adapter, spread
from tests.tensor_watch import TensorWatch
from tests.training.small import Net, expert, save, state_of


def sample_of(live: LiveExpert) -> LiveSample:
    infos = live.vector.infos
    return LiveSample(live, {name: coordinates(name, infos[name].numel, 30) for name in infos})


def expected(live: LiveExpert) -> Tensor:
    infos = live.vector.infos
    whole = {name: live.vector.flat(name, 0, info.numel) for name, info in infos.items()}
    return torch.cat([values[coordinates(name, len(values), 30)] for name, values in whole.items()]).double()


class Odd(nn.Module):
    """Layers whose weights are laid out in other ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.turned = Conv1D(5, 8)
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.zeros(0, 3))


def test_a_model_that_is_trained_whole() -> None:
    model = Odd()
    base = state_of(model)
    live = LiveExpert(model, base)
    sample = sample_of(live)
    assert not sample.read().any()
    for seed in (1, 2):
        perturb(model, seed)
        assert torch.equal(sample.read(), expected(live))
    assert sample.read().abs().min() > 0


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter(rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["embed", "turned", "conv"], modules_to_save=["head"], use_rslora=rslora
    )
    model = peft.get_peft_model(Odd(), config)
    perturb(model, 1)
    live = LiveExpert(model, None)
    assert len(list(live.vector)) == 5
    sample = sample_of(live)
    for seed in (2, 3):
        perturb(model, seed)
        torch.testing.assert_close(sample.read(), expected(live), rtol=1e-5, atol=1e-8)


def test_dora_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["turned", "head"], use_dora=True)
    live = LiveExpert(perturb(peft.get_peft_model(Odd(), config), 1), None)
    with pytest.raises(UnsupportedError, match=r"not DoRA.*head\.weight"):
        sample_of(live)


def test_finer_copies_are_read() -> None:
    model = Odd().bfloat16()
    base = state_of(model)
    live = LiveExpert(model, base)
    sample = sample_of(live)
    copies = {p: (p.detach().float() + 1e-5).requires_grad_() for p in model.parameters()}
    live.refine(lambda name, tensor: [copies[tensor]])
    assert torch.equal(sample.read(), expected(live))
    assert 0.9e-5 < sample.read().median() < 1.1e-5


def test_reading_waits_for_nothing_and_makes_nothing_large() -> None:
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(5)))
    live = LiveExpert(perturb(model, 1), {name: v + 0.01 for name, v in state_of(model).items()})
    sample = sample_of(live)
    with TensorWatch() as watch:
        sample.read()
    assert watch.waits == 0
    assert watch.peak < 40 * 1024  # of 1.8 MB


def spread_samples(layouts: tuple[str, ...], kind: str, folder: Path) -> dict[str, Tensor]:
    found = {}
    for layout in layouts:
        model: Any = spread(expert(1) if kind == "full" else adapter(Net()), layout)
        live = LiveExpert(model, folder / "base" if kind == "full" else None, Ranks.world())
        found[layout] = sample_of(live).read()
    return found


@pytest.mark.parametrize(
    ("size", "kind", "layouts"),
    [
        (2, "full", ON_TWO),
        (2, "adapter", ("ddp", "fsdp2")),
        pytest.param(4, "full", ON_FOUR, marks=pytest.mark.slow),
    ],
)
def test_ranks_put_the_sample_of_one_process_together(
    size: int, kind: str, layouts: tuple[str, ...], tmp_path: Path
) -> None:
    save(Net(), tmp_path / "base")
    live = LiveExpert(expert(1) if kind == "full" else adapter(Net()), tmp_path / "base")
    alone = sample_of(live).read()
    for found in run_ranks(spread_samples, size, layouts, kind, tmp_path):
        for layout in layouts:
            assert torch.equal(found[layout], alone), layout
