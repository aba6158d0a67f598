"""Statistics against float64 over all data at once, and what recalibrating must not touch."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from mergeready import merge, recalibrate
from mergeready.errors import NonFiniteError, OptionError, UnsupportedError
from tests.models import TinyConvNet, perturb


class Deep(nn.Module):
    """Two BatchNorm layers with dropout between them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.first = nn.BatchNorm2d(5, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.point = nn.Conv2d(5, 4, 1)
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.point(self.drop(torch.relu(self.first(self.conv(x)))))).mean((2, 3))


def images(seed: int, count: int) -> Tensor:
    return 2 * torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + seed


def live_expert(base: nn.Module, seed: int) -> nn.Module:
    expert = perturb(copy.deepcopy(base), seed, 0.02).train()
    for step in range(3):
        expert(images(seed + step, 16))
    return expert.eval()


def in_float64(model: Deep, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What the layers would see if all data were one batch, by the formulas."""
    d = copy.deepcopy(model).double()
    h = d.conv(x.double())

    def normalised(norm: nn.BatchNorm2d, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        out = (h - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
        return out * norm.weight.view(shape) + norm.bias.view(shape), (mean, h.var((0, 2, 3), unbiased=True))

    h, first = normalised(d.first, h)
    _, second = normalised(d.second, d.point(torch.relu(h)))
    return {"first": first, "second": second}


def assert_statistics(norm: nn.BatchNorm2d, exact: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(norm.running_mean.double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), exact[1], rtol=1e-5, atol=1e-6)


def test_one_big_batch_gives_its_own_statistics_in_every_layer() -> None:
    model, x = Deep(), images(1, 40)
    done = recalibrate(model, [x], force=True)
    assert done.layers == ("first", "second")
    assert done.batches == 1
    exact = in_float64(model, x)
    assert_statistics(model.first, exact["first"])
    assert_statistics(model.second, exact["second"])


def test_many_batches_pool_to_the_statistics_of_all_data() -> None:
    """Exactly so in the first layer, whose inputs do not depend on how data are cut; torch's own update is not."""
    model, x = Deep(), torch.cat([images(1, 20), images(4, 17)])
    batches = [(part, None) for part in x.split(6)]
    recalibrate(model, batches, force=True)
    exact = in_float64(model, x)
    assert_statistics(model.first, exact["first"])
    assert int(model.first.num_batches_tracked) == len(batches)
    other = Deep()
    torch.optim.swa_utils.update_bn([part for part, _ in batches], other)
    assert not torch.allclose(other.first.running_var.double(), exact["first"][1], rtol=0.05)


def test_equal_batches_of_equal_data_agree_with_torch() -> None:
    model = Deep()
    model.drop.p = 0.0  # torch's update lets dropout act
    other = copy.deepcopy(model)
    x = images(3, 64)
    recalibrate(model, [x, x], force=True)
    torch.optim.swa_utils.update_bn([x, x], other)
    for ours, theirs in ((model.first, other.first), (model.second, other.second)):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-2, atol=1e-5)


def test_nothing_else_changes() -> None:
    model = Deep()
    model.first.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    recalibrate(model, [images(0, 8)], force=True)
    assert torch.equal(torch.rand(2), expected)
    assert [m.training for m in model.modules()] == modes
    assert (model.first.momentum, model.second.momentum) == (0.3, None)
    after = model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{kind}" for layer in ("first", "second") for kind in kinds}
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_nothing_has_changed(error: type[BaseException]) -> None:
    model = Deep()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def batches() -> object:
        yield images(0, 8)
        raise error

    with pytest.raises(error):
        recalibrate(model, batches(), force=True)  # type: ignore[arg-type]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert not model.first._forward_pre_hooks


def test_live_experts_are_told_from_frozen_ones() -> None:
    base = Deep()
    frozen = [perturb(copy.deepcopy(base), seed, 0.02) for seed in (1, 2)]
    merged = merge(base, frozen, scale=0.5)
    before = merged.first.running_mean.clone()
    with pytest.raises(
        UnsupportedError, match=r"the base's own BatchNorm statistics.*trained with frozen ones"
    ):
        recalibrate(merged, [images(0, 8)], base=base, experts=frozen)
    assert torch.equal(merged.first.running_mean, before)
    live = [live_expert(base, seed) for seed in (1, 2)]
    merged = merge(base, live, scale=0.5)
    assert recalibrate(merged, [images(0, 8)], base=base, experts=live).layers == ("first", "second")
    assert not torch.equal(merged.first.running_mean, before)


def test_without_evidence_it_asks() -> None:
    for evidence in ({}, {"base": Deep()}, {"experts": [Deep()]}):
        with pytest.raises(OptionError, match="pass `base` and `experts`, or force=True"):
            recalibrate(Deep(), [images(0, 8)], **evidence)


def test_layers_that_were_frozen_in_every_expert_stay() -> None:
    base = Deep()
    expert = copy.deepcopy(base)
    expert.second.train()
    expert(images(1, 16))
    expert.eval()
    merged = merge(base, [expert])
    done = recalibrate(merged, [images(0, 8)], base=base, experts=[expert])
    assert (done.layers, done.kept) == (("second",), ("first",))
    assert torch.equal(merged.first.running_mean, base.first.running_mean)
    h = torch.relu(base.first(base.conv(images(0, 8))))  # the first layer ran on its own statistics
    torch.testing.assert_close(
        merged.second.running_mean, base.point(h).mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_both_kinds_together_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    base = Deep()
    experts = [live_expert(base, 1), perturb(copy.deepcopy(base), 2, 0.02)]
    with caplog.at_level(logging.WARNING, "mergeready"):
        recalibrate(merge(base, experts), [images(0, 8)], base=base, experts=experts)
    assert "of 2 experts were trained with live BatchNorm statistics" in caplog.text


def test_models_without_batch_norm_are_told_so() -> None:
    with pytest.raises(UnsupportedError, match="Linear has no BatchNorm layer with running statistics"):
        recalibrate(nn.Linear(2, 2), [torch.ones(4, 2)], force=True)
    untracked = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(UnsupportedError, match="Sequential has no BatchNorm"):
        recalibrate(untracked, [torch.ones(4, 2)], force=True)


def test_data_that_do_not_serve_are_refused() -> None:
    model = TinyConvNet()
    before = model.norm.running_mean.clone()
    with pytest.raises(OptionError, match="`batches` is empty"):
        recalibrate(model, [], force=True)
    with pytest.raises(OptionError, match="no batch reached norm"):
        recalibrate(model, [images(0, 4)], force=True, forward=lambda m, x: m.conv(x))
    bad = images(0, 4)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="inputs of norm are NaN"):
        recalibrate(model, [bad], force=True)
    assert torch.equal(model.norm.running_mean, before)
