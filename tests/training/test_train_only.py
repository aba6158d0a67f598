"""What each filter keeps of real architectures, and that the rest stays bit for bit."""

from __future__ import annotations

import pytest
import torch

from mergeready.errors import OptionError
from mergeready.training.train_only import kept_names, train_only
from tests.models import TinyConvNet, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from tests.training.small import Net, state_of


def test_attention_of_each_family() -> None:
    bert = kept_names(tiny_bert(), "attention")
    assert len(bert) == 2 * 4
    assert "bert.encoder.layer.1.attention.output.dense.weight" in bert
    assert len(kept_names(tiny_llama(), "attention")) == 2 * 4
    gpt2 = kept_names(tiny_gpt2(), "attention")
    assert gpt2 == [f"transformer.h.{i}.attn.{n}.weight" for i in range(2) for n in ("c_attn", "c_proj")]
    assert not any("mlp" in name or "bias" in name for name in (*bert, *gpt2))


def test_linear_layers_of_both_kinds() -> None:
    assert kept_names(Net(), "linear") == [
        "embed.weight",
        "layers.0.weight",
        "layers.1.weight",
        "head.weight",
    ]
    assert len(kept_names(tiny_gpt2(), "linear")) == 2 * 4
    assert kept_names(TinyConvNet(), "linear") == ["head.weight"]


def test_the_last_blocks_and_what_follows() -> None:
    names = kept_names(tiny_bert(), "last:1")
    assert all("layer.1." in n or n.startswith(("bert.pooler", "classifier")) for n in names)
    assert any("classifier" in name for name in names)
    everything = kept_names(tiny_bert(), "last:2")
    assert not any("embeddings" in name for name in everything)
    assert kept_names(Net(), "last:9")[0] == "layers.0.weight"


def test_only_what_is_kept_moves() -> None:
    model = tiny_bert()
    before = state_of(model)
    trained = train_only(model, r"re:layer\.0\..*query", also="^classifier")
    assert trained == [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.query.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**token_batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    changed = [n for n, t in state_of(model).items() if not torch.equal(t, before[n])]
    assert set(changed) == set(trained)


def test_what_was_frozen_stays_frozen() -> None:
    model = Net()
    model.head.requires_grad_(False)
    assert "head.weight" not in train_only(model, "linear")
    assert not model.head.weight.requires_grad


def test_what_does_not_serve_is_refused() -> None:
    model = Net()
    for keep in ("", "all", "last:", "last:0", "last:-1", "last:x", "re:"):
        with pytest.raises(OptionError, match="a filter is"):
            train_only(model, keep)
    with pytest.raises(OptionError, match="no regular expression"):
        train_only(model, "re:(")
    with pytest.raises(OptionError, match="keeps no parameter"):
        train_only(model, "attention")
    with pytest.raises(OptionError, match="no numbered blocks"):
        train_only(TinyConvNet(), "last:1")
    assert all(p.requires_grad for p in model.parameters())
