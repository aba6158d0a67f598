"""Kronecker factors against Gauss-Newton matrices that are computed by brute force in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from mergeready.errors import NonFiniteError, OptionError, UnsupportedError
from mergeready.experts.factors import KroneckerFactors
from mergeready.training.kronecker import kronecker_factors, write_factors
from tests.experts.test_peft_lora import VARIANTS, Variant, trained
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from tests.training.small import Net, examples, left_alone
from tests.training.test_activations import batch_for


def gauss_newton(model: nn.Module, names: list[str], logits_of: object) -> Tensor:
    """Jᵀ (diag p − p pᵀ) J of one example, by the parameters of these names flattened one after the other, float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def logits(chosen: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters | chosen, tie_weights=False, **logits_of(model)).reshape(-1)

    chosen = {name: parameters[name] for name in names}
    jacobians = jacrev(logits)(chosen)
    J = torch.cat([jacobians[name].flatten(1) for name in names], 1)
    p = logits(chosen).softmax(0)
    return J.T @ (torch.diag(p) - torch.outer(p, p)) @ J


def matrix_block(block: Tensor, outputs: int, inputs: int, bias: bool) -> Tensor:
    """From parameters [W row by row, b] to [W b] row by row."""
    if not bias:
        return block
    index = torch.cat(
        [
            torch.cat([torch.arange(inputs) + o * inputs, torch.tensor([outputs * inputs + o])])
            for o in range(outputs)
        ]
    )
    return block[index][:, index]


def close(ours: Tensor, exact: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=rtol, atol=1e-5 * float(exact.abs().max()) + 1e-12
    )


@pytest.mark.parametrize("name", ["embed", "layers.0", "layers.1", "head"])
def test_one_example_gives_the_gauss_newton_block_itself(name: str) -> None:
    model = Net().train()  # dropout is off while factors are collected
    x, _ = examples(1, part=0, count=1)
    B, A = kronecker_factors(model, [x], labels="expected").read(f"{name}.weight")
    exact = gauss_newton(model, [f"{name}.weight", f"{name}.bias"], lambda m: {"args": (x.double(),)})
    layer = model.get_submodule(name)
    close(torch.kron(B, A), matrix_block(exact, layer.out_features, layer.in_features, True))


def test_weights_stored_transposed() -> None:
    model, ids = tiny_gpt2(), torch.tensor([[5]])

    def last(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return m(**batch).logits[:, -1]

    found = kronecker_factors(model, [{"input_ids": ids}], labels="expected", forward=last, largest=100)
    name = "transformer.h.1.attn.c_proj.weight"

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids).logits[0, -1]

    bias = name.replace("weight", "bias")
    names = [f"inner.{name}", f"inner.{bias}"]
    exact = gauss_newton(Last(), names, lambda m: {"args": (ids,)})
    transposed = torch.arange(32 * 32).reshape(32, 32).T.reshape(-1)  # W is stored (inputs, outputs)
    order = torch.cat([transposed, 32 * 32 + torch.arange(32)])
    layer = found.layers[name]
    assert (layer.transposed, layer.bias) == (True, bias)
    close(torch.kron(*found.read(name)), matrix_block(exact[order][:, order], 32, 32, True))


def test_many_examples_give_the_mean_of_each_factor() -> None:
    model = Net()
    x, y = examples(1, part=0, count=11)
    double = copy.deepcopy(model).double().eval()
    h = torch.tanh(double.embed(x.double()))
    rest = lambda z, h: double.head(  # noqa: E731 - from the first layer's output on
        double.norm((h := h + torch.tanh(z)) + torch.tanh(double.layers[1](h)))
    )
    z = double.layers[0](h)
    inputs = torch.cat([h, torch.ones(11, 1)], 1)
    exact_A, exact_B, true_B = inputs.T @ inputs / 11, torch.zeros(16, 16), torch.zeros(16, 16)
    for i in range(11):
        J = jacrev(lambda one, i=i: rest(one, h[i]))(z[i])
        p = rest(z[i], h[i]).softmax(0)
        exact_B = exact_B + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / 11
        g = J.T @ (p - nn.functional.one_hot(y[i], 3).double())
        true_B = true_B + torch.outer(g, g) / 11
    B, A = kronecker_factors(model, [x[:4], x[4:]], labels="expected").read("layers.0.weight")
    close(A, exact_A)
    close(B, exact_B)
    found = kronecker_factors(model, [(x[:4], y[:4]), (x[4:], y[4:])], labels="true")
    close(found.read("layers.0.weight")[0], true_B)
    assert found.facts == {"examples": 11, "labels": "true", "draws": 1, "seed": 0}


def test_sampled_labels_are_right_on_average_and_repeatable() -> None:
    model, x = Net(), examples(1, part=0, count=20)[0]
    exact = kronecker_factors(model, [x], labels="expected").read("head.weight")[0].double()
    draws = torch.stack(
        [kronecker_factors(model, [x], draws=3, seed=s).read("head.weight")[0].double() for s in range(60)]
    )
    assert float(((draws.mean(0) - exact) / (draws.std(0) / 60**0.5)).abs().max()) < 4
    again = kronecker_factors(model, [x], draws=3, seed=7).read("head.weight")[0]
    assert torch.equal(again.double(), draws[7])
    single = torch.stack(
        [kronecker_factors(model, [x], seed=s).read("head.weight")[0].double() for s in range(60)]
    )
    assert float(single.var(0).sum()) > 1.5 * float(draws.var(0).sum())


def test_outputs_that_are_changed_in_place() -> None:
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3))

    x = torch.randn(9, 4)
    first, second = (kronecker_factors(net(i), [x], labels="expected") for i in (False, True))
    for name in first.layers:
        for a, b in zip(first.read(name), second.read(name), strict=True):
            assert torch.equal(a, b)


def test_padding_does_not_count() -> None:
    model, batch = tiny_llama(), token_batch(3, count=2)
    batch["attention_mask"][1, 5:] = 0
    name = "model.layers.0.mlp.up_proj.weight"
    found = kronecker_factors(model, [batch])
    apart = [
        kronecker_factors(model, [{n: t[i : i + 1, :length] for n, t in batch.items()}])
        for i, length in enumerate((12, 5))
    ]
    A = sum(one.read(name)[1] * length for one, length in zip(apart, (12, 5), strict=True)) / 17
    close(found.read(name)[1], A)
    other = {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    other["input_ids"][1, 5:] = 9
    close(kronecker_factors(model, [other]).read(name)[0], found.read(name)[0])


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name in ("plain", "dora", "conv1d")], ids=lambda v: v.name
)
def test_an_adapter_s_are_those_of_the_model_it_makes(variant: Variant) -> None:
    base, adapter = trained(variant)
    flags = [p.requires_grad for p in adapter.parameters()]
    found = kronecker_factors(adapter, [batch_for(base)], base=base, seed=1)
    assert [p.requires_grad for p in adapter.parameters()] == flags
    made = copy.deepcopy(adapter).merge_and_unload(safe_merge=True)
    exact = kronecker_factors(made, [batch_for(base)], base=base, seed=1)
    assert found.layers == exact.layers
    for name in exact.layers:
        for a, b in zip(found.read(name), exact.read(name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()) + 1e-12)


def test_names_are_the_base_s_and_heads_stay_out() -> None:
    base = tiny_bert()
    found = kronecker_factors(perturb(copy.deepcopy(base), 1), [token_batch()], base=base.bert)
    assert "encoder.layer.0.output.dense.weight" in found.layers
    assert not any(name.startswith(("bert.", "classifier")) for name in found.layers)
    assert found.base is not None


@pytest.mark.parametrize("memory", [1, 40_000, 10**9])
def test_layers_in_groups_are_as_layers_at_once(tmp_path: Path, memory: int) -> None:
    model, x = Net(), examples(1, part=0, count=10)[0]
    path = tmp_path / "law.factors.safetensors"
    written = write_factors(path, model, [x[:3], x[3:]], memory=memory, label="law")
    found = kronecker_factors(model, [x[:3], x[3:]], label="law")
    assert (written.label, written.layers, written.facts) == (found.label, found.layers, found.facts)
    for name in found.layers:
        for a, b in zip(written.read(name), found.read(name), strict=True):
            assert torch.equal(a, b)
    half = write_factors(tmp_path / "half", model, [x], dtype=torch.bfloat16)
    assert (tmp_path / "half").stat().st_size < 0.6 * path.stat().st_size
    assert half.source.infos["inputs/embed.weight"].dtype == torch.bfloat16


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_never_run_are_left_out(tmp_path: Path) -> None:
    assert list(kronecker_factors(Half(), [torch.randn(5, 4)]).layers) == ["used.weight"]
    write_factors(tmp_path / "x", Half(), [torch.randn(5, 4)])
    assert list(KroneckerFactors.load(tmp_path / "x").layers) == ["used.weight"]


def test_the_model_stays_as_it_was() -> None:
    x, _ = examples(1, part=0, count=4)
    with left_alone() as model:
        kronecker_factors(model, [x])
    with left_alone() as model, pytest.raises(RuntimeError):
        kronecker_factors(model, [x, torch.ones(4, 5)])


def test_what_does_not_serve_is_refused(tmp_path: Path) -> None:
    model, x = Net(), examples(1, part=0, count=4)[0]
    with pytest.raises(OptionError, match="`labels` must be sampled, expected or true"):
        kronecker_factors(model, [x], labels="all")
    with pytest.raises(OptionError, match="`draws` must be"):
        kronecker_factors(model, [x], draws=2, labels="expected")
    with pytest.raises(OptionError, match="`batches` is empty"):
        kronecker_factors(model, [])
    with pytest.raises(OptionError, match="one output"):
        kronecker_factors(nn.Linear(6, 1), [x])
    with pytest.raises(OptionError, match="many positions: labels='expected'"):
        kronecker_factors(tiny_llama(), [token_batch()], labels="expected")
    with pytest.raises(UnsupportedError, match="nothing to factor"):
        kronecker_factors(model, [x], largest=2)
    with pytest.raises(UnsupportedError, match="nothing to factor"):
        kronecker_factors(nn.Sequential(nn.Conv2d(3, 2, 6), nn.Flatten()), [torch.randn(2, 3, 6, 6)])
    assert list(kronecker_factors(TinyConvNet(), [torch.randn(2, 3, 6, 6)]).layers) == ["head.weight"]
    with pytest.raises(NonFiniteError, match=r"embed.weight"):
        kronecker_factors(model, [torch.full((2, 6), 1e30)])
    with pytest.raises(OptionError, match="more than once"):
        write_factors(tmp_path / "x", model, iter([x]))
    with pytest.raises(OptionError, match="`memory`"):
        write_factors(tmp_path / "x", model, [x], memory=0)
    assert not list(tmp_path.iterdir())
