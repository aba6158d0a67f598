"""RegMean++ against the implementation in fusion_bench, and as a loop written out in float64.

``GOLDEN`` is what ``RegMeanAlgorithmPlusPlus`` of tanganke/fusion_bench, commit 54c9e8c, gives in float64 for the
stack, experts and data that are made here, with ``reduce_non_diagonal_ratio=0.9``; the class was run with its
abstract methods filled in for ``Stack``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mergeready import input_grams, merge, regmean_pp
from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts import open_expert
from tests.merging.test_fisher import grid
from tests.models import perturb, tiny_bert, tiny_gpt2, token_batch

GOLDEN = {
    "blocks.0.up.weight": [
        [-1.1543930299241818, 0.37403718018461296, -0.9781668652273114],
        [1.1206069700758186, -0.22596281981538724, -1.003166865227311],
        [0.5206069700758185, -0.8259628198153874, 1.2718331347726886],
        [-0.09574311080875642, -1.1594253564389665, 0.6464397155646375],
    ],
    "blocks.0.down.weight": [
        [1.5720449325821115, 0.22001570644329588, -1.152180405917849, 1.0688306916434929],
        [-0.3779550674178885, -1.1549842935567038, 0.34781959408215146, -0.8811693083565082],
        [1.1220449325821114, -0.22998429355670422, -1.0271804059178482, 0.6188306916434909],
    ],
    "blocks.1.up.weight": [
        [1.434158219549186, 0.06437578553356249, -1.0157159686064],
        [0.822636500695128, -0.5283430221725046, 1.5804625692826477],
        [0.22263650069512814, -1.1283430221725048, 0.980462569282648],
        [-0.377363499304872, -1.1533430221725047, 0.3804625692826478],
    ],
    "blocks.1.down.weight": [
        [1.2455514690010894, -0.24934952498653362, -1.1076951940327193, 0.694583490314149],
        [-0.6556258158689892, 1.4811248944355244, 0.05771565591875505, -0.9071450889437165],
        [0.83943721150912, -0.493665509434813, 1.5707020605911794, 0.21884459144520818],
    ],
    "blocks.1.down.bias": [-0.525, 1.5750000000000002, 0.225],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.down(torch.relu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                shape = tuple(parameter.shape)
                change = 0.2 * grid(shape, 50 * k + i) if k else 0.0
                parameter.copy_(grid(shape, i) + change)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def world() -> tuple[Stack, list[Stack], list[list[Tensor]]]:
    data = [[grid((5, 3), k).float(), grid((5, 3), k + 1).float()] for k in (100, 102)]
    return Stack(0), [Stack(1), Stack(2)], data


def test_fusion_bench_gives_the_same() -> None:
    base, experts, data = world()
    grams = regmean_pp(base, base, experts, data)
    merged = merge(base, experts, "regmean", grams=grams).state_dict()
    for name, values in GOLDEN.items():
        golden = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(merged[name].double(), golden, rtol=1e-5, atol=1e-6)


def test_a_loop_written_out_in_float64() -> None:
    base, experts, data = world()
    weights, alpha = [0.7, 0.3], 1.0
    grams = regmean_pp(base, base, experts, data, alpha=alpha, weights=weights)
    merged = merge(base, experts, "regmean", grams=grams, alpha=alpha, weights=weights).state_dict()

    flows = [torch.cat(batches).double() for batches in data]
    for index in range(2):
        block = copy.deepcopy(base.blocks[index]).double()
        own = [copy.deepcopy(expert.blocks[index]).double() for expert in experts]
        hidden = [torch.relu(b.up(x)) for b, x in zip(own, flows, strict=True)]
        with torch.no_grad():
            for layer, inputs in (("up", flows), ("down", hidden)):
                scaled = [(w / len(x)) ** 0.5 * x for w, x in zip(weights, inputs, strict=True)]
                wanted = [x @ getattr(b, layer).weight.T for x, b in zip(scaled, own, strict=True)]
                solution = torch.linalg.lstsq(torch.cat(scaled), torch.cat(wanted), driver="gelsd").solution.T
                getattr(block, layer).weight.copy_(solution)
                getattr(block, layer).bias.copy_(
                    sum(w * getattr(b, layer).bias for w, b in zip(weights, own, strict=True))
                )
            for name, parameter in block.named_parameters():
                ours = merged[f"blocks.{index}.{name}"].double()
                torch.testing.assert_close(ours, parameter.detach(), rtol=1e-3, atol=1e-4)
            flows = [block(x) for x in flows]


def test_the_first_block_is_that_of_regmean_and_later_ones_are_not() -> None:
    base, experts, data = world()
    ours = regmean_pp(experts[0], base, experts, data)
    plain = [input_grams(expert, batches, base=base) for expert, batches in zip(experts, data, strict=True)]
    for pp, regmean in zip(ours, plain, strict=True):
        assert set(pp.infos) == set(regmean.infos)
        for name in ("blocks.0.up.weight", "blocks.0.down.weight"):
            torch.testing.assert_close(pp.read(name), regmean.read(name))
        assert not torch.allclose(
            pp.read("blocks.1.up.weight"), regmean.read("blocks.1.up.weight"), rtol=1e-3
        )
        assert pp.facts == {"layers": "merged", "alpha": 0.9, "weights": [1.0, 1.0], "rest": "average"}


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_real_architectures(make: object) -> None:
    base = make()
    experts = [perturb(copy.deepcopy(base), seed, 0.03) for seed in (1, 2)]
    for expert in experts:  # a block that begins with a norm begins with the expert's own
        expert.load_state_dict({n: t for n, t in base.state_dict().items() if ".ln_1." in n}, strict=False)
    data = [[token_batch(10 * i + j) for j in range(3)] for i in range(2)]
    grams = regmean_pp(base, base, experts, data)
    plain = [input_grams(expert, batches, base=base) for expert, batches in zip(experts, data, strict=True)]
    assert [set(g.infos) for g in grams] == [set(g.infos) for g in plain]
    merged = merge(base, experts, "regmean", grams=grams)
    # The last block's layers were told what they would see: run the merged model and look.
    seen = [input_grams(merged, batches, base=base) for batches in data]
    first = next(n for n in plain[0].infos if "attn.c_attn" in n or "query" in n)
    last = first.replace(".0.", ".1.")
    for told, actual, alone in zip(grams, seen, plain, strict=True):
        torch.testing.assert_close(told.read(last), actual.read(last), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(alone.read(last), actual.read(last), rtol=1e-2, atol=1e-2)


def test_twins_give_back_the_expert() -> None:
    base, (expert, _), data = world()
    grams = regmean_pp(base, base, [expert, expert], data)
    merged = merge(base, [expert, expert], "regmean", grams=grams).state_dict()
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_model_may_be_an_expert_or_the_base_and_stays_as_it_was() -> None:
    base, experts, data = world()
    results = []
    for model in (base, experts[1], Stack(0).requires_grad_(False)):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        model.train()
        grams = regmean_pp(model, base, experts, data)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert all(m.training and not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
        results.append(grams)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(a.read(n), b.read(n)) for n in a.infos)


def test_one_layer_that_runs_twice_is_seen_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](torch.tanh(self.blocks[0](x)))

    torch.manual_seed(0)
    base = Twice()
    expert = perturb(copy.deepcopy(base), 1, 0.01)
    x = torch.randn(9, 3)
    (found,) = regmean_pp(base, base, [expert], [[x]])
    both = torch.cat([x, torch.tanh(expert.blocks[0](x))]).detach()
    torch.testing.assert_close(found.read("blocks.0.weight"), both.T @ both / 18)


def test_what_does_not_fit_is_refused() -> None:
    base, experts, data = world()
    with pytest.raises(OptionError, match="data of 1 experts, where there are 2"):
        regmean_pp(base, base, experts, data[:1])
    with pytest.raises(OptionError, match="not an iterator"):
        regmean_pp(base, base, experts, [data[0], iter(data[1])])
    with pytest.raises(OptionError, match="`forward` has 1 functions for 2"):
        regmean_pp(base, base, experts, data, forward=[lambda m, b: m(b)])
    with pytest.raises(OptionError, match="`alpha` must be"):
        regmean_pp(base, base, experts, data, alpha=2.0)
    norm = nn.LayerNorm(3)
    with pytest.raises(UnsupportedError, match="no linear layer of LayerNorm ran"):
        regmean_pp(norm, norm, [open_expert(perturb(nn.LayerNorm(3), 1), norm)], [[torch.ones(2, 3)]])
