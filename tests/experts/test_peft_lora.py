"""Every LoRA variant against PEFT's own forward pass, PEFT's own merge, and a round trip over disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2ForTokenClassification

from mergeready.errors import (
    BaseMismatchError,
    FormatError,
    MismatchError,
    NonFiniteError,
    NotTrainedError,
    UnsupportedError,
)
from mergeready.experts import LiveExpert, LowRank, dense, open_expert
from mergeready.merging import merge, merge_adapters
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch


def logits(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(inner, TinyConvNet):
            return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        return model(**token_batch()).logits


def tiny_gpt2_tagger() -> nn.Module:
    torch.manual_seed(0)
    return GPT2ForTokenClassification(tiny_gpt2().config).eval()


@dataclass(frozen=True)
class Variant:
    name: str
    make: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


ATTENTION = ["query", "value"]
VARIANTS = [
    Variant("plain", tiny_bert, {"target_modules": ATTENTION, "lora_alpha": 12}),
    Variant("all-linear", tiny_bert, {"target_modules": ["query", "dense"]}),
    Variant("rslora", tiny_bert, {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 6}),
    Variant(
        "patterns",
        tiny_bert,
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"value": 2, r"layer\.1\..*dense": 6},
            "alpha_pattern": {"attention.output.dense": 32, "query": 3},
            "lora_alpha": 16,
        },
    ),
    Variant(
        "rslora with patterns",
        tiny_bert,
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"value": 2}},
    ),
    Variant("lora_bias", tiny_bert, {"target_modules": ATTENTION, "lora_bias": True, "lora_alpha": 12}),
    Variant("bias all", tiny_bert, {"target_modules": ATTENTION, "bias": "all"}),
    Variant("bias lora_only", tiny_bert, {"target_modules": ATTENTION, "bias": "lora_only"}),
    Variant("embedding", tiny_bert, {"target_modules": ["word_embeddings", "query"], "lora_alpha": 12}),
    Variant("modules_to_save", tiny_bert, {"target_modules": ATTENTION, "modules_to_save": ["classifier"]}),
    Variant(
        "token rows",
        tiny_bert,
        {"target_modules": ATTENTION, "trainable_token_indices": {"word_embeddings": [3, 7]}},
    ),
    Variant("dora", tiny_bert, {"target_modules": ATTENTION, "use_dora": True, "lora_alpha": 12}),
    Variant("dora embedding", tiny_bert, {"target_modules": ["word_embeddings"], "use_dora": True}),
    Variant("conv1d", tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Variant(
        "conv1d dora",
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    ),
    Variant(
        "conv1d and a linear head", tiny_gpt2_tagger, {"target_modules": ["c_attn", "c_proj", "classifier"]}
    ),
    Variant("embeddings and head", tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    Variant(
        "bias all and a saved head",
        tiny_bert,
        {"target_modules": ATTENTION, "bias": "all", "modules_to_save": ["classifier"]},
    ),
    Variant("saved normalisation", TinyConvNet, {"target_modules": ["conv"], "modules_to_save": ["norm"]}),
    Variant("conv", TinyConvNet, {"target_modules": ["conv", "point", "head"], "lora_alpha": 12}),
    Variant("conv dora", TinyConvNet, {"target_modules": ["conv", "point"], "use_dora": True}),
    Variant("orthogonal init", tiny_bert, {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
]
by_name = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


def trained(variant: Variant, seed: int = 1) -> tuple[nn.Module, PeftModel]:
    """A base and a PEFT model on a copy of it whose adapter was moved away from its start."""
    base = variant.make()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **variant.options))
    perturb(model, seed, scale=0.1)
    return base, model.eval()


def apply(base: nn.Module, vector: Any) -> nn.Module:
    """The base with a task vector added by hand, in double precision."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in vector:
            parameters[name].copy_((parameters[name].double() + dense(vector[name]).double()).float())
    return model


@by_name
def test_base_plus_task_vector_acts_as_the_adapter(variant: Variant, tmp_path: Path) -> None:
    base, model = trained(variant)
    model.save_pretrained(tmp_path / "adapter")
    expert = open_expert(tmp_path / "adapter", base)
    assert expert.format == "peft"
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    torch.testing.assert_close(logits(apply(base, expert.vector)), expected, rtol=1e-5, atol=1e-5)


@by_name
def test_agrees_with_merge_and_unload(variant: Variant, tmp_path: Path) -> None:
    base, model = trained(variant)
    model.save_pretrained(tmp_path / "adapter")
    ours = apply(base, open_expert(tmp_path / "adapter", base).vector)
    theirs = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@by_name
def test_live_adapter_equals_its_saved_copy(variant: Variant, tmp_path: Path) -> None:
    base, model = trained(variant)
    model.save_pretrained(tmp_path / "adapter")
    saved = open_expert(tmp_path / "adapter", base).vector
    live = LiveExpert(model, base).vector
    assert set(live) == set(saved)
    for name in saved:
        assert torch.equal(dense(live[name]), dense(saved[name])), name


@by_name
def test_live_adapter_follows_training(variant: Variant) -> None:
    base, model = trained(variant)
    live = LiveExpert(model, base)
    perturb(model, seed=9, scale=0.05)
    torch.testing.assert_close(logits(apply(base, live.vector)), logits(model), rtol=1e-5, atol=1e-5)


@by_name
def test_slices_equal_the_whole(variant: Variant, tmp_path: Path) -> None:
    base, model = trained(variant)
    model.save_pretrained(tmp_path / "adapter")
    vector = open_expert(tmp_path / "adapter", base).vector
    for name, info in vector.infos.items():
        whole = dense(vector[name]).reshape(-1)
        for start, stop in [(0, 1), (info.numel // 3, info.numel - 1), (info.numel // 2, info.numel)]:
            torch.testing.assert_close(
                vector.flat(name, start, stop), whole[start:stop], rtol=1e-5, atol=1e-7
            )


# Trained base biases stay when an adapter is off; whoever switches it off writes them back.
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "bias" not in v.options], ids=lambda v: v.name)
def test_base_is_what_remains_when_the_adapter_is_off(variant: Variant) -> None:
    base, model = trained(variant)
    live = LiveExpert(model, base)
    flags = [p.requires_grad for p in model.parameters()]
    with live.adapter_off():
        torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-6)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_low_rank_stays_low_rank(tmp_path: Path) -> None:
    base, model = trained(VARIANTS[0])
    model.save_pretrained(tmp_path)
    vector = open_expert(tmp_path, base).vector
    assert all(isinstance(vector[name], LowRank) and vector[name].rank() == 4 for name in vector)


def test_prefix_of_a_task_model_is_understood(tmp_path: Path) -> None:
    base, model = trained(VARIANTS[0])
    model.save_pretrained(tmp_path)
    encoder = base.bert
    vector = open_expert(tmp_path, encoder).vector
    assert set(vector) <= set(dict(encoder.named_parameters()))


def saved_plain(tmp_path: Path) -> tuple[nn.Module, Path]:
    base, model = trained(VARIANTS[0])
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST_A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
FIRST_B = FIRST_A.replace("lora_A", "lora_B")


def test_untrained_adapter_is_refused(tmp_path: Path) -> None:
    base = tiny_bert()
    get_peft_model(tiny_bert(), LoraConfig(target_modules=ATTENTION)).save_pretrained(tmp_path)
    with pytest.raises(NotTrainedError, match="never trained"):
        open_expert(tmp_path, base)


def test_nan_is_named(tmp_path: Path) -> None:
    base, folder = saved_plain(tmp_path)
    rewrite(folder, lambda t: t[FIRST_B].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"layer\.0\.attention\.self\.query\.lora_B"):
        open_expert(folder, base)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    base, folder = saved_plain(tmp_path)
    rewrite(folder, lambda t: t.pop(FIRST_B))
    with pytest.raises(FormatError, match=r"only one of two LoRA factors: .*query\.A"):
        open_expert(folder, base)


def test_swapped_factors_are_refused(tmp_path: Path) -> None:
    base, folder = saved_plain(tmp_path)

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST_A], tensors[FIRST_B] = tensors[FIRST_B].contiguous(), tensors[FIRST_A].contiguous()

    rewrite(folder, swap)
    with pytest.raises(MismatchError, match="do not make its"):
        open_expert(folder, base)


def test_all_missing_targets_are_listed(tmp_path: Path) -> None:
    _, folder = saved_plain(tmp_path)
    with pytest.raises(
        MismatchError, match=r"query.weight is not in the base.*value.weight is not in the base"
    ):
        open_expert(folder, tiny_gpt2())


def test_unknown_tensors_are_listed(tmp_path: Path) -> None:
    base, folder = saved_plain(tmp_path)
    rewrite(folder, lambda t: t.update({"lora_unet_down.alpha": torch.ones(1)}))
    with pytest.raises(FormatError, match=r"lora_unet_down\.alpha"):
        open_expert(folder, base)


def edit_config(folder: Path, **changes: object) -> None:
    import json

    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "duplicates layers"),
        ({"alora_invocation_tokens": [1, 2]}, "invocation tokens"),
        ({"use_qalora": True}, "pooled groups"),
        ({"peft_type": "IA3"}, "its type is IA3"),
        ({"future_field": {"x": 1}}, "future_field"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_its_reason(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    base, folder = saved_plain(tmp_path)
    edit_config(folder, **change)
    with pytest.raises(UnsupportedError, match=message):
        open_expert(folder, base)


def test_declared_hub_id_must_agree(tmp_path: Path) -> None:
    from mergeready.experts import Base

    base, folder = saved_plain(tmp_path)
    edit_config(folder, base_model_name_or_path="org/other-model")
    opened = Base.open(base)
    named = Base(opened.source, opened.identity, name="org/this-model")
    with pytest.raises(BaseMismatchError, match="org/other-model"):
        open_expert(folder, named)


def test_tied_embeddings_changed_twice_are_refused(tmp_path: Path) -> None:
    base = tiny_gpt2()
    config = LoraConfig(r=4, target_modules=["wte", "lm_head"])
    model = perturb(get_peft_model(copy.deepcopy(base), config), 1, 0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match="ties its embeddings"):
        open_expert(tmp_path, base)


def test_pickled_adapter_is_not_read(tmp_path: Path) -> None:
    base, folder = saved_plain(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        open_expert(folder, base)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_tied_embeddings_changed_in_one_place_are_refused(target: str, tmp_path: Path) -> None:
    """PEFT adapts the one module; the merged weight would change the other as well."""
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=[target]))
    perturb(model, 1, 0.1).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for form in (base, base.state_dict()):
        with pytest.raises(UnsupportedError, match=f"through .*{target}.*ties its embeddings"):
            open_expert(tmp_path / "adapter", form)
    with pytest.raises(
        (UnsupportedError, MismatchError), match=r"ties its|lm_head\.weight is not in the base"
    ):
        open_expert(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(UnsupportedError, match="ties its embeddings"):
        LiveExpert(model, None)


def test_trained_token_rows_of_tied_embeddings_act_in_both_places(tmp_path: Path) -> None:
    base = tiny_gpt2()
    config = LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices={"wte": [3, 7]})
    model = perturb(get_peft_model(copy.deepcopy(base), config), 1, 0.1).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    vector = open_expert(tmp_path, base).vector
    assert vector["transformer.wte.weight"].rank() == 2
    torch.testing.assert_close(logits(apply(base, vector)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "target"), [(tiny_bert, "word_embeddings"), (tiny_llama, "embed_tokens")])
def test_embeddings_of_a_base_that_ties_nothing_are_no_problem(
    make: Callable[[], nn.Module], target: str, tmp_path: Path
) -> None:
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = perturb(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=[target])), 1, 0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    for form in (base, tmp_path / "base"):
        vector = open_expert(tmp_path / "adapter", form).vector
        torch.testing.assert_close(logits(apply(base, vector)), logits(model), rtol=1e-5, atol=1e-5)


def test_a_head_that_the_base_lacks_stays_out_unless_strict(tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS if v.name == "modules_to_save")
    base, model = trained(variant)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        MismatchError, match=r"lacks: classifier\.(bias, classifier\.weight|weight, classifier\.bias)"
    ):
        open_expert(tmp_path, base.bert)
    expert = open_expert(tmp_path, base.bert, strict=False)
    assert set(expert.extra) == {"classifier.weight", "classifier.bias"}
    assert len(expert.vector) == 4


def with_stored_embeddings(folder: Path, **options: Any) -> nn.Module:
    base = tiny_llama()
    model = perturb(get_peft_model(copy.deepcopy(base), LoraConfig(**options)), 1, 0.1)
    model.save_pretrained(folder, save_embedding_layers=True)
    assert any(".base_layer." in name for name in load_file(folder / "adapter_model.safetensors"))
    return base


def test_the_base_s_head_below_factors_is_no_change(tmp_path: Path) -> None:
    """PEFT stores it with the adapter; where it is not the base's, what it differs by is a change as well."""
    base = with_stored_embeddings(tmp_path, target_modules=["lm_head"])
    delta = open_expert(tmp_path, base).vector["lm_head.weight"]
    assert isinstance(delta, LowRank)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[5] += 1
    more = open_expert(tmp_path, other).vector["lm_head.weight"]
    torch.testing.assert_close(other.lm_head.weight + dense(more), base.lm_head.weight + dense(delta))
    with pytest.raises(
        UnsupportedError, match=r"lm_head\.weight: its factors lie on other weights than the base's"
    ):
        merge_adapters(other, [tmp_path], tmp_path / "out")


def test_the_base_s_embeddings_below_trained_rows_are_no_change(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}}
    base = with_stored_embeddings(tmp_path, **options)
    assert open_expert(tmp_path, base).vector["model.embed_tokens.weight"].rank() == 1
    with torch.no_grad():
        base.model.embed_tokens.weight[5] += 1
    with pytest.raises(MismatchError, match=r"below the trained rows of model\.embed_tokens\.weight"):
        open_expert(tmp_path, base)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_frozen_embeddings_stored_with_an_adapter_are_no_change(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """PEFT stores them where it finds them resized, tied or not."""
    base = make()
    base.save_pretrained(tmp_path / "base")
    target = "c_attn" if make is tiny_gpt2 else "q_proj"
    model = perturb(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=[target])), 1, 0.1).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("lora_" not in name for name in stored) == 2
    vector = open_expert(tmp_path / "adapter", tmp_path / "base").vector
    assert all(isinstance(vector[name], LowRank) for name in vector)
    torch.testing.assert_close(logits(apply(base, vector)), logits(model), rtol=1e-5, atol=1e-5)


def test_running_statistics_are_no_change_of_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are the adapter's statistics, as a full model's are."""
    base, model = trained(next(variant for variant in VARIANTS if variant.name == "saved normalisation"))
    for buffer in model.buffers():
        buffer.add_(torch.ones_like(buffer))
    model.save_pretrained(tmp_path / "moved")
    expert = open_expert(tmp_path / "moved", base)
    assert set(expert.vector) == {"conv.weight", "norm.weight", "norm.bias"}
    assert expert.statistics is not None
    assert torch.equal(expert.statistics.read("norm.running_mean"), base.norm.running_mean + 1)
    merge_adapters(base, [tmp_path / "moved"], tmp_path / "out")
    assert "live BatchNorm statistics in 1 layers, while the merged model has the base's" in caplog.text
    averaged = merge(base, [tmp_path / "moved"], statistics="average")
    torch.testing.assert_close(logits(averaged), logits(model), rtol=1e-5, atol=1e-5)
