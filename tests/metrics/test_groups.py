"""The names that real architectures use, each with its group and layer stated by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from torch import nn
from transformers import (
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from mergeready.metrics import GROUPS, group_of, layer_of
from tests.models import TinyConvNet, bert_config, tiny_bert, tiny_gpt2, tiny_llama


def tiny_vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    )


# By architecture: the parts of a name that decide, most telling first, and the group they stand for.
EXPECTED: list[tuple[Callable[[], nn.Module], dict[str, str]]] = [
    (
        tiny_bert,
        {
            "LayerNorm": "norm",
            "embeddings.": "embedding",
            ".attention.": "attention",
            "intermediate.dense": "mlp",
            ".output.dense": "mlp",
            "pooler.": "other",
            "classifier.": "other",
        },
    ),
    (
        tiny_gpt2,
        {".ln_": "norm", "wte": "embedding", "wpe": "embedding", ".attn.": "attention", ".mlp.": "mlp"},
    ),
    (
        tiny_llama,
        {
            "norm": "norm",
            "embed_tokens": "embedding",
            "lm_head": "embedding",
            ".self_attn.": "attention",
            ".mlp.": "mlp",
        },
    ),
    (
        tiny_vit,
        {
            "layernorm": "norm",
            "embeddings": "embedding",
            ".attention.": "attention",
            ".mlp.": "mlp",
            "intermediate.dense": "mlp",  # the names of early releases of transformers 5
            ".output.dense": "mlp",
            "classifier": "other",
        },
    ),
    (TinyConvNet, {"norm": "norm", "conv": "other", "point": "other", "head": "other"}),
]


@pytest.mark.parametrize(("make", "rules"), EXPECTED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_parameter_is_in_its_group(make: Callable[[], nn.Module], rules: dict[str, str]) -> None:
    for name, _ in make().named_parameters():
        expected = next((group for part, group in rules.items() if part in name), "no rule")
        assert group_of(name) == expected, name
        assert group_of(name) in GROUPS


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama, tiny_vit])
def test_every_layer_s_parameters_carry_its_number(make: Callable[[], nn.Module]) -> None:
    names = list(dict(make().named_parameters()))
    counted = Counter(layer_of(name) for name in names)
    assert set(counted) == {None, 0, 1}
    assert counted[0] == counted[1]
    assert all((layer_of(n) is None) == (".0." not in n and ".1." not in n) for n in names)


@pytest.mark.parametrize(
    ("name", "group", "layer"),
    [
        ("t5.encoder.block.3.layer.0.SelfAttention.q.weight", "attention", 3),
        ("encoder.block.3.layer.1.DenseReluDense.wi_0.weight", "mlp", 3),
        ("model.layers.7.mlp.experts.12.down_proj.weight", "mlp", 7),
        ("model.layers.7.self_attn.q_norm.weight", "norm", 7),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "attention", 11),
        ("model.decoder.layers.0.encoder_attn.k_proj.bias", "attention", 0),
        ("stages.2.blocks.5.norm1.weight", "norm", 2),
        ("layer1.0.bn1.weight", "norm", None),
        ("head.weight", "other", None),
    ],
)
def test_names_of_other_families(name: str, group: str, layer: int | None) -> None:
    assert (group_of(name), layer_of(name)) == (group, layer)


def test_the_prediction_head_of_a_masked_model_is_no_layer() -> None:
    names = [n for n, _ in BertForMaskedLM(bert_config()).named_parameters() if n.startswith("cls.")]
    assert names
    assert all(layer_of(name) is None for name in names)
