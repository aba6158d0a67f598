"""The case table of adapter formats, row by row: each is read exactly, or refused with its reason.

Exactly means: the base plus the task vector computes what the library computes with the adapter active.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from mergeready.errors import MismatchError, NotTrainedError, UnsupportedError
from mergeready.experts import Base, Expert, LowRank, dense, open_expert
from mergeready.experts.open import open_experts
from mergeready.merging import merge, merge_adapters
from tests.experts import test_adapterhub as adapterhub
from tests.experts import test_tokens as tokens
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch

QV = ["query", "value"]
MOE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MOE)).eval()


def tiny_gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**MOE, head_dim=8)).eval()


def logits(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        if isinstance(inner, TinyConvNet):
            return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        return model(**token_batch()).logits


def saved(
    make: Callable[[], nn.Module], folder: Path, config: Any, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A base, and a trained PEFT model of it whose adapter lies in the folder."""
    base = make()
    model = perturb(get_peft_model(copy.deepcopy(base), config), 1, 0.1).eval()
    model.save_pretrained(folder, **options)
    return base, model


def acts(make: Callable[[], nn.Module], folder: Path, **options: Any) -> Expert:
    """Check that an adapter acts as PEFT says."""
    base, model = saved(make, folder, LoraConfig(**({"r": 4} | options)))
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    torch.testing.assert_close(logits(merge(base, [folder])), expected, rtol=2e-5, atol=2e-5)
    return open_expert(folder, base)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_alpha_and_r_per_module(tmp_path: Path) -> None:
    expert = acts(
        tiny_bert,
        tmp_path,
        target_modules=[*QV, "dense"],
        lora_alpha=16,
        rank_pattern={"value": 2, r"layer\.1\..*dense": 6},
        alpha_pattern={"attention.output.dense": 32, "^bert.encoder.layer.0.attention.self.query": 3},
    )
    ranks = {name: expert.vector[name].rank() for name in expert.vector}
    assert ranks["bert.encoder.layer.0.attention.self.value.weight"] == 2
    assert ranks["bert.encoder.layer.1.output.dense.weight"] == 6


def test_rslora(tmp_path: Path) -> None:
    acts(tiny_bert, tmp_path, target_modules=QV, use_rslora=True, lora_alpha=6, rank_pattern={"value": 2})


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, TinyConvNet])
def test_dora(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    targets = {tiny_bert: QV, tiny_gpt2: ["c_attn", "c_proj"], TinyConvNet: ["conv", "point"]}
    expert = acts(
        make,
        tmp_path,
        target_modules=targets[make],
        use_dora=True,
        lora_alpha=12,
        fan_in_fan_out=make is tiny_gpt2,
    )
    assert not any(isinstance(expert.vector[name], LowRank) for name in expert.vector)


def test_lora_bias(tmp_path: Path) -> None:
    acts(tiny_bert, tmp_path, target_modules=QV, lora_bias=True, lora_alpha=12)


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_trained_biases_of_the_base(which: str, tmp_path: Path) -> None:
    expert = acts(tiny_bert, tmp_path, target_modules=QV, bias=which)
    assert sum(name.endswith(".bias") for name in expert.vector) == (4 if which == "lora_only" else 19)


def test_embedding_lora(tmp_path: Path) -> None:
    acts(tiny_bert, tmp_path, target_modules=["word_embeddings", "query"], lora_alpha=12)


def test_convolutions(tmp_path: Path) -> None:
    acts(TinyConvNet, tmp_path, target_modules=["conv", "point", "head"], lora_alpha=12)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = TinyConvNet()
        net.point = nn.Conv2d(8, 8, 3, groups=4)
        net.head = nn.Linear(8, 4)
        return net

    base, _ = saved(make, tmp_path, LoraConfig(r=4, target_modules=["point"]))
    with pytest.raises(MismatchError, match="grouped convolutions are not supported"):
        open_expert(tmp_path, base)


def test_conv1d(tmp_path: Path) -> None:
    acts(tiny_gpt2, tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)


@pytest.mark.parametrize("variant", ["fused-qv", "fused-k", "everywhere"])
def test_fused_qkv(variant: str) -> None:
    adapterhub.test_folded_weights_give_the_library_s_own_logits(adapterhub.GOLDENS / "gpt2" / variant)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss], ids=["out-in", "in-out"])
def test_target_parameters(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Stacks of experts, stored (E, out, in) or (E, in, out); PEFT nests one wrapper a parameter."""
    expert = acts(
        make,
        tmp_path,
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.down_proj": 10},
    )
    assert len(expert.vector) == 3
    for name, info in expert.vector.infos.items():
        whole = dense(expert.vector[name]).reshape(-1)
        for start, stop in ((0, 5), (info.numel // 3 + 1, info.numel - 2)):
            torch.testing.assert_close(expert.vector.flat(name, start, stop), whole[start:stop])


def test_target_parameters_that_could_be_either_way_round_are_refused(tmp_path: Path) -> None:
    def square() -> nn.Module:
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**(MOE | {"intermediate_size": 32}))).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    base, _ = saved(square, tmp_path, config)
    with pytest.raises(MismatchError, match="fit several"):
        open_expert(tmp_path, base)


def test_experts_of_transformers_4_and_5(tmp_path: Path) -> None:
    """Version 5 stacks in memory what checkpoints keep apart; an adapter knows one of the two."""
    base, _ = saved(
        tiny_mixtral,
        tmp_path / "stacked",
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    )
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(MismatchError, match="pass the loaded model as base"):
        open_expert(tmp_path / "stacked", tmp_path / "base")
    module = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    apart = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(24, 2)}
    (tmp_path / "apart").mkdir()
    save_file(apart, tmp_path / "apart" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1"]}
    (tmp_path / "apart" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="transformers 5 stacks the experts"):
        open_expert(tmp_path / "apart", base)
    assert len(open_expert(tmp_path / "apart", tmp_path / "base").vector) == 1


def refused(tmp_path: Path, message: str, **changes: object) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=4, target_modules=QV))
    edit(tmp_path, **changes)
    with pytest.raises(UnsupportedError, match=message):
        open_expert(tmp_path, base)


def test_layer_replication(tmp_path: Path) -> None:
    refused(tmp_path, "duplicates layers", layer_replication=[[0, 2], [1, 2]])


def test_modules_to_save(tmp_path: Path) -> None:
    expert = acts(tiny_bert, tmp_path, target_modules=QV, modules_to_save=["classifier"])
    assert {n for n in expert.vector if "classifier" in n} == {"classifier.weight", "classifier.bias"}


def test_modules_to_save_of_another_label_set(tmp_path: Path) -> None:
    def five_labels() -> nn.Module:
        model = tiny_bert()
        model.classifier = nn.Linear(32, 5)
        return model

    saved(five_labels, tmp_path, LoraConfig(r=4, target_modules=QV, modules_to_save=["classifier"]))
    with pytest.raises(MismatchError, match=r"classifier\.weight is \(5, 32\), in the base \(3, 32\)"):
        open_expert(tmp_path, tiny_bert())


def test_trainable_token_indices(tmp_path: Path) -> None:
    expert = acts(tiny_bert, tmp_path, target_modules=QV, trainable_token_indices={"word_embeddings": [3, 7]})
    assert expert.vector["bert.embeddings.word_embeddings.weight"].rank() == 2


def test_tied_embeddings(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["wte", "lm_head"])
    base, _ = saved(tiny_gpt2, tmp_path, config, save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match="ties its embeddings"):
        open_expert(tmp_path, base)


def test_tied_embeddings_of_a_model_without_the_head(tmp_path: Path) -> None:
    """A classifier on the body of a masked language model, whose head it has not."""
    config = LoraConfig(r=4, target_modules=["word_embeddings"], modules_to_save=["classifier"])
    base, model = saved(tiny_bert, tmp_path / "adapter", config)
    pretrained = BertForMaskedLM(base.config)
    pretrained.bert.load_state_dict(base.bert.state_dict(), strict=False)
    pretrained.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="ties its embeddings"):
        open_expert(tmp_path / "adapter", tmp_path / "base", strict=False)
    edit(tmp_path / "adapter", task_type="SEQ_CLS")
    merge(tmp_path / "base", [tmp_path / "adapter"], output=tmp_path / "out", strict=False)
    merged = copy.deepcopy(base)
    body = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    merged.bert.load_state_dict(body.state_dict(), strict=False)
    merged.classifier = model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(logits(merged), logits(model), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_initialisations_that_change_the_base(init: str, tmp_path: Path) -> None:
    refused(tmp_path, "path_initial_model_for_weight_conversion", init_lora_weights=init)


def test_pissa_as_it_is_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa")
    base, _ = saved(tiny_bert, tmp_path, config)
    with pytest.raises(UnsupportedError, match="changed the base"):
        open_expert(tmp_path, base)


def test_pissa_after_conversion(tmp_path: Path) -> None:
    base = tiny_bert()
    config = LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa", lora_alpha=4)
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "start")
    perturb(model, 1, 0.1).eval()
    edit(tmp_path / "start", init_lora_weights=True)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    torch.testing.assert_close(logits(merge(base, [tmp_path / "end"])), logits(model), rtol=2e-5, atol=2e-5)


def test_qlora_is_noted(tmp_path: Path) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=4, target_modules=QV))
    edit(tmp_path, base_model_name_or_path="org/model-bnb-4bit")
    opened = Base.open(base)
    named = Base(opened.source, opened.identity, name="org/model")
    (note,) = open_expert(tmp_path, named).notes
    assert "trained on the quantised org/model-bnb-4bit" in note


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=4, target_modules=QV))
    state = dict(base.state_dict())
    name = "bert.encoder.layer.0.attention.self.query.weight"
    state[name] = torch.zeros(state[name].shape, dtype=torch.uint8)
    with pytest.raises(MismatchError, match=rf"{name} is stored quantised"):
        open_expert(tmp_path, state)


OTHERS = {
    "adalora": (AdaLoraConfig(target_modules=QV, total_step=10), "merge_and_unload"),
    "loha": (LoHaConfig(target_modules=QV), "merge_and_unload"),
    "lokr": (LoKrConfig(target_modules=QV), "merge_and_unload"),
    "vera": (VeraConfig(target_modules=QV, r=4), "merge_and_unload"),
    "ia3": (IA3Config(target_modules=QV, feedforward_modules=[]), "multiplies"),
    "oft": (OFTConfig(target_modules=QV, r=8, oft_block_size=0), "multiplies"),
    "prompt": (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "not weights"),
    "prefix": (PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "not weights"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_peft_adapters(name: str, tmp_path: Path) -> None:
    config, reason = OTHERS[name]
    base, _ = saved(tiny_bert, tmp_path, config)
    with pytest.raises(UnsupportedError, match=rf"its type is .*{reason}"):
        open_expert(tmp_path, base)


@pytest.mark.parametrize("part", [".bias", "LayerNorm", ""])
def test_bitfit_layernorm_tuning_and_full_fine_tuning(part: str) -> None:
    base, expert = tiny_bert(), tiny_bert()
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if part in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(merge(base, [expert])), logits(expert), rtol=1e-5, atol=1e-5)


def test_inactive_adapter(tmp_path: Path) -> None:
    get_peft_model(tiny_bert(), LoraConfig(target_modules=QV)).save_pretrained(tmp_path)
    with pytest.raises(NotTrainedError, match="never trained"):
        open_expert(tmp_path, tiny_bert())


def test_target_sets_that_differ(tmp_path: Path) -> None:
    """A union: a module that an expert does not adapt is unchanged by it. How much they share is reported."""
    base, first = saved(tiny_bert, tmp_path / "a", LoraConfig(r=4, target_modules=QV))
    _, second = saved(tiny_bert, tmp_path / "b", LoraConfig(r=2, target_modules=["query", "dense"]))
    both = [tmp_path / "a", tmp_path / "b"]
    made = merge_adapters(base, both, tmp_path / "out")
    assert made.overlap[0][1] == pytest.approx(2 / 11)
    merged = merge(base, [made.folder]).state_dict()
    starts, *ends = (m.state_dict() for m in (base, *(merge(base, [f]) for f in both)))
    for name, start in starts.items():
        exact = start.double() + sum(end[name].double() - start.double() for end in ends)
        torch.testing.assert_close(merged[name].double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(first), logits(second))


def test_added_tokens(tmp_path: Path) -> None:
    """By text, never by id: see test_tokens for all that can differ."""
    tokens.saved(tiny_llama(), tmp_path / "base", tokens.numbered(tokens.TOKENS))
    for name, added in (("law", "<law>"), ("code", "<code>")):
        tokens.saved(tokens.fine_tuned(), tmp_path / name, tokens.numbered([*tokens.TOKENS, added]))
    with pytest.raises(MismatchError, match="row 60 is '<law>'"):
        open_experts([tmp_path / "law", tmp_path / "code"], tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision_are_folded_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=4, target_modules=QV, lora_alpha=12))
    path = tmp_path / "adapter_model.safetensors"
    halves = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(halves, path)
    vector = open_expert(tmp_path, base).vector
    for name in vector:
        key = f"base_model.model.{name.removesuffix('weight')}lora"
        exact = 3 * halves[f"{key}_B.weight"].double() @ halves[f"{key}_A.weight"].double()
        torch.testing.assert_close(dense(vector[name]).double(), exact, rtol=1e-5, atol=1e-6)
