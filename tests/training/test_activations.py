"""Gram matrices against float64 products of inputs that were computed apart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready import input_grams, merge
from mergeready.errors import NonFiniteError, OptionError, UnsupportedError
from mergeready.training.batches import forward_logits
from tests.experts.test_peft_lora import VARIANTS, Variant, trained
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from tests.training.small import Net, examples


def outer(x: Tensor) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    return rows.T @ rows / len(rows)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def batch_for(model: nn.Module) -> object:
    if isinstance(model, TinyConvNet):
        return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    return token_batch(2, count=2)


def test_products_of_each_layer_s_inputs() -> None:
    model = Net().train()
    x, _ = examples(1, part=0, count=30)
    found = input_grams(model, [x[:7], x[7:]])
    double = copy.deepcopy(model).double().eval()
    h = torch.tanh(double.embed(x.double()))
    exact = {"embed.weight": outer(x)}
    for i, layer in enumerate(double.layers):
        exact[f"layers.{i}.weight"] = outer(h)
        h = h + torch.tanh(layer(h))
    exact["head.weight"] = outer(double.norm(h))
    assert set(found.infos) == set(exact)
    for name, gram in exact.items():
        close(found.read(name), gram)
    assert found.facts == {"positions": 30}
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_transposed_layers_and_tied_heads_of_gpt2() -> None:
    model, batch = tiny_gpt2(), token_batch()
    found = input_grams(model, [batch])
    with torch.no_grad():
        seen = model(**batch, output_hidden_states=True).hidden_states
    close(
        found.read("transformer.h.0.attn.c_attn.weight^T"),
        outer(model.transformer.h[0].ln_1(seen[0]).detach()),
    )
    assert "transformer.wte.weight" not in found.infos  # the head's weight is the embedding's
    assert all(name.endswith("^T") for name in found.infos)


def test_padding_does_not_count() -> None:
    model, batch = tiny_bert(), token_batch(3, count=2)
    batch["attention_mask"][1, 5:] = 0
    found = input_grams(model, [batch])
    hidden = model.bert.embeddings(input_ids=batch["input_ids"]).detach()
    real = torch.cat([hidden[0], hidden[1, :5]])
    for name in ("query", "key", "value"):
        close(found.read(f"bert.encoder.layer.0.attention.self.{name}.weight"), outer(real))
    cut = {n: t[1:, :5] for n, t in batch.items()}
    whole = {n: t[:1] for n, t in batch.items()}
    again = input_grams(model, [whole, cut])
    for name in found.infos:
        close(found.read(name), again.read(name).double())


def test_layers_with_one_input_after_it_was_changed_in_place() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    x = torch.randn(5, 3)
    found = input_grams(Changing(), [x, x + 1])
    both = torch.cat([x, x + 1])
    close(found.read("a.weight"), outer(both))
    close(found.read("b.weight"), outer(2 * both))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_an_adapter_s_are_those_of_the_model_it_makes(variant: Variant) -> None:
    base, adapter = trained(variant)
    batch = batch_for(base)
    found = input_grams(adapter, [batch], base=base)
    made = copy.deepcopy(adapter).merge_and_unload(safe_merge=True)
    exact = input_grams(made, [batch], base=base)
    assert found.infos.keys() == exact.infos.keys()
    for name in exact.infos:
        torch.testing.assert_close(found.read(name), exact.read(name), rtol=1e-3, atol=1e-3)


def test_merged_outputs_are_closer_than_averaged_ones(tmp_path: Path) -> None:
    """What RegMean is for, on each expert's own data and from files."""
    base = tiny_llama()
    experts = [perturb(copy.deepcopy(base), seed, 0.05) for seed in (1, 2)]
    data = [[token_batch(10 * i + j, count=8) for j in range(6)] for i in range(2)]
    paths = [
        input_grams(expert, batches, base=base).save(tmp_path / f"{i}.safetensors")
        for i, (expert, batches) in enumerate(zip(experts, data, strict=True))
    ]

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(
                float((forward_logits(model, b) - forward_logits(expert, b)).square().mean())
                for expert, batches in zip(experts, data, strict=True)
                for b in batches
            )

    regmean = error(merge(base, experts, "regmean", grams=paths))
    assert regmean < error(merge(base, experts, "average"))


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no linear layer of Conv2d ran"):
        input_grams(nn.Conv2d(1, 1, 1), [torch.ones(1, 1, 2, 2)])
    with pytest.raises(OptionError, match="`batches` is empty"):
        input_grams(nn.Linear(1, 1), [])
    with pytest.raises(NonFiniteError, match=r"inputs of weight are NaN"):
        input_grams(nn.Linear(1, 1), [torch.tensor([[float("inf")]])])
    found = input_grams(TinyConvNet(), [torch.randn(2, 3, 6, 6)])
    assert list(found.infos) == ["head.weight"]


def test_after_an_exception_no_hook_is_left() -> None:
    model = Net().train()
    with pytest.raises(RuntimeError):
        input_grams(model, [examples(1, 0, 4)[0], torch.ones(4, 5)])
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
