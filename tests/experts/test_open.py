from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from mergeready.errors import (
    BaseMismatchError,
    FormatError,
    MismatchError,
    NonFiniteError,
    OptionError,
    UnsupportedError,
)
from mergeready.experts import Base, Expert, LiveExpert, TaskVector, dense, open_expert, squared_norms
from mergeready.experts.record import RECORD_NAME, write_record
from mergeready.merging import merge
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama

Tensors = dict[str, Tensor]


def state(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def fine_tuned(make: Callable[[], nn.Module] = tiny_bert, seed: int = 1) -> nn.Module:
    return perturb(make(), seed)


def check(vector: TaskVector, expert: Tensors, base: Tensors) -> None:
    """Every delta against the difference in float64."""
    for name in vector:
        exact = expert[name].double() - base[name].double()
        torch.testing.assert_close(dense(vector[name]).double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_a_full_expert_in_every_form_on_a_base_in_every_form(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    base, model = make(), fine_tuned(make)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    for on in (tmp_path / "base", base, base.state_dict()):
        for form in (tmp_path / "one", str(tmp_path / "many"), model, model.state_dict()):
            expert = open_expert(form, on)
            assert (expert.format, expert.extra, expert.missing) == ("full", (), ())
            assert expert.base_checked == "weights"
            assert set(expert.vector) == set(dict(base.named_parameters()))
            check(expert.vector, model.state_dict(), base.state_dict())


def test_what_is_known_of_an_expert(tmp_path: Path) -> None:
    fine_tuned().save_pretrained(tmp_path / "expert")
    from_folder = open_expert(tmp_path / "expert", tiny_bert())
    assert (from_folder.label, from_folder.folder) == (str(tmp_path / "expert"), tmp_path / "expert")
    assert from_folder.vector.label == from_folder.label
    live = open_expert(fine_tuned(), tiny_bert())
    assert (live.label, live.folder) == ("live BertForSequenceClassification", None)
    assert live.vector.base == Base.open(tiny_bert()).identity


def test_names_shapes_and_leftovers_are_all_listed_at_once() -> None:
    expert = state(fine_tuned())
    del expert["bert.pooler.dense.weight"], expert["bert.pooler.dense.bias"]
    expert["classifier.weight"] = torch.zeros(5, 32)
    expert["bert.embeddings.word_embeddings.weight"] = torch.zeros(70, 32)
    expert["new.head.weight"] = torch.zeros(2)
    with pytest.raises(MismatchError) as caught:
        open_expert(expert, tiny_bert())
    message = str(caught.value)
    for part in (
        "classifier.weight is (5, 32), in the base (3, 32)",
        "bert.embeddings.word_embeddings.weight is (70, 32), in the base (64, 32)",
        "bert.pooler.dense.weight is missing",
        "bert.pooler.dense.bias is missing",
        "new.head.weight is not in the base",
    ):
        assert part in message


def test_what_only_one_side_has_is_refused_with_a_hint() -> None:
    expert = state(fine_tuned()) | {"head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    with pytest.raises(MismatchError, match=r"lacks: head\.weight, head\.bias\..*strict=False"):
        open_expert(expert, tiny_bert())
    del expert["head.weight"], expert["head.bias"], expert["classifier.bias"]
    with pytest.raises(MismatchError, match=r"classifier\.bias is missing"):
        open_expert(expert, tiny_bert())


def test_leftovers_stay_out_unless_strict() -> None:
    expert = state(fine_tuned()) | {"head.weight": torch.zeros(2)}
    del expert["classifier.bias"]
    opened = open_expert(expert, tiny_bert(), strict=False)
    assert opened.extra == ("head.weight",)
    assert opened.missing == ("classifier.bias",)
    assert "head.weight" not in opened.vector
    assert "classifier.bias" not in opened.vector


def test_shapes_must_agree_even_if_not_strict() -> None:
    expert = state(fine_tuned()) | {"classifier.weight": torch.zeros(5, 32)}
    with pytest.raises(MismatchError, match=r"classifier\.weight is \(5, 32\), in the base \(3, 32\)"):
        open_expert(expert, tiny_bert(), strict=False)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"no parameter name of the base occurs \(bert\.embeddings"):
        open_expert(tiny_gpt2(), tiny_bert(), strict=False)


def test_a_task_model_on_its_encoder_and_back() -> None:
    task, encoder = fine_tuned(), tiny_bert().bert
    opened = open_expert(task, encoder, strict=False)
    assert opened.extra == ("classifier.weight", "classifier.bias")
    assert set(opened.vector) == set(dict(encoder.named_parameters()))
    check(opened.vector, task.bert.state_dict(), encoder.state_dict())
    back = open_expert(task.bert, tiny_bert(), strict=False)
    assert back.missing == ("classifier.weight", "classifier.bias")
    check(back.vector, task.state_dict(), tiny_bert().state_dict())


def test_two_names_for_one_parameter_must_agree() -> None:
    """A tied base and an expert that was saved with both names."""
    base, expert = tiny_gpt2(), state(fine_tuned(tiny_gpt2))
    assert torch.equal(expert["lm_head.weight"], expert["transformer.wte.weight"])
    check(open_expert(expert, base).vector, expert, base.state_dict())
    expert["lm_head.weight"] = expert["lm_head.weight"] + 1e-3
    with pytest.raises(MismatchError, match=r"transformer\.wte\.weight and lm_head\.weight differ"):
        open_expert(expert, base, strict=False)


def test_one_name_under_two_prefixes_is_refused() -> None:
    base = {"x.weight": torch.ones(3, 3), "y.weight": torch.ones(3, 3)}
    expert = {"m.x.weight": torch.ones(3, 3), "m.y.weight": torch.ones(3, 3), "x.weight": torch.zeros(3, 3)}
    with pytest.raises(MismatchError, match=r"m\.x\.weight and x\.weight differ"):
        open_expert(expert, base, strict=False)


def test_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match="does not descend from"):
        open_expert(fine_tuned(), tiny_bert(seed=5))


def recorded(folder: Path, base: nn.Module, model: nn.Module) -> Path:
    model.save_pretrained(folder)
    write_record(folder, Base.open(base).identity)
    return folder


def test_a_recorded_base_is_compared_exactly(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "expert", tiny_bert(), fine_tuned())
    assert open_expert(folder, tiny_bert()).base_checked == "recorded"
    nearly = tiny_bert()
    with torch.no_grad():
        nearly.classifier.weight *= 1 + 1e-6  # far too close for comparing weights to notice
    assert open_expert(fine_tuned(), nearly).base_checked == "weights"
    with pytest.raises(BaseMismatchError, match=r"made for another base.*\(classifier\.weight\)"):
        open_expert(folder, nearly)


def test_a_record_vouches_for_an_expert_that_went_far(tmp_path: Path) -> None:
    far = perturb(tiny_bert(), seed=1, scale=3.0)
    with pytest.raises(BaseMismatchError, match="does not descend"):
        open_expert(far, tiny_bert())
    assert open_expert(recorded(tmp_path / "far", tiny_bert(), far), tiny_bert()).base_checked == "recorded"


def adapter(folder: Path, base: nn.Module) -> Path:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"]))
    perturb(model, 1, 0.1).save_pretrained(folder)
    return folder


def test_an_adapter_s_base_is_known_only_from_its_record(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tiny_bert())
    assert open_expert(folder, tiny_bert(seed=5)).base_checked == "nothing"
    write_record(folder, Base.open(tiny_bert()).identity)
    assert open_expert(folder, tiny_bert()).base_checked == "recorded"
    with pytest.raises(BaseMismatchError, match="made for another base"):
        open_expert(folder, tiny_bert(seed=5))


def test_an_altered_record_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "expert", tiny_bert(), fine_tuned())
    content = json.loads((folder / RECORD_NAME).read_text())
    content["base"]["digests"].pop("classifier.weight")
    (folder / RECORD_NAME).write_text(json.dumps(content))
    with pytest.raises(BaseMismatchError, match="contradicts itself"):
        open_expert(folder, tiny_bert())


def test_nan_is_found_by_the_first_pass_over_the_values() -> None:
    expert = state(fine_tuned())
    expert["classifier.bias"][1] = float("nan")
    expert["bert.pooler.dense.weight"][0, 0] = float("inf")
    opened = open_expert(expert, tiny_bert())
    with pytest.raises(NonFiniteError, match=r"values in bert\.pooler\.dense\.weight, classifier\.bias"):
        squared_norms(opened.vector)


def test_open_experts_and_task_vectors_pass_through() -> None:
    opened = open_expert(fine_tuned(), tiny_bert())
    assert open_expert(opened, tiny_bert()) is opened
    wrapped = open_expert(opened.vector, tiny_bert())
    assert isinstance(wrapped, Expert)
    assert (wrapped.vector, wrapped.format) == (opened.vector, "task vector")
    for form in (opened, opened.vector):
        with pytest.raises(BaseMismatchError, match="another base"):
            open_expert(form, tiny_bert(seed=5))


def test_loose_lora_factors_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    perturb(model, 1, 0.1)
    for form in (model.state_dict(), model):
        with pytest.raises(OptionError, match="LoRA factors without their configuration"):
            open_expert(form, tiny_bert(), strict=False)
    opened = open_expert(LiveExpert(model, tiny_bert()).vector, tiny_bert())
    assert len(opened.vector) == 2


def test_injected_adapters_are_not_taken_for_an_unchanged_model() -> None:
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(OptionError, match="LoRA factors"):
        open_expert(model, tiny_bert(), strict=False)


def test_eight_bit_floats_are_refused() -> None:
    expert = {name: t.to(torch.float8_e4m3fn) for name, t in state(fine_tuned()).items()}
    with pytest.raises(UnsupportedError, match="8-bit floats"):
        open_expert(expert, tiny_bert())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_quantised_weights_are_refused_unless_they_are_the_base_s(dtype: torch.dtype) -> None:
    """Their floats alone would be merged: scales of other integers, norms and embeddings."""
    base, expert = tiny_bert().state_dict(), state(fine_tuned())
    name = "bert.encoder.layer.0.attention.self.query.weight"
    codes = torch.arange(base[name].numel()).remainder(100).reshape(base[name].shape).to(dtype)
    frozen = base | {name: codes, "mask.bias": codes}
    trained = expert | {name: codes, "mask.bias": codes.flip(0)}
    assert name not in open_expert(trained, frozen).vector
    for other, start in (
        (trained | {name: codes.flip(0)}, frozen),
        (trained | {name: torch.zeros_like(codes)}, base | {name: base[name] * 0}),
        (expert, base | {name: codes}),
        (expert | {name.replace("weight", "qweight"): codes}, base),
    ):
        for strict in (True, False):
            with pytest.raises(
                UnsupportedError, match=r"stores weights as integers: bert\.\S*query\.q?weight\."
            ):
                open_expert(other, start, strict=strict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_may_differ(dtype: torch.dtype) -> None:
    expert = {name: t.to(dtype) for name, t in state(fine_tuned()).items()}
    check(open_expert(expert, tiny_bert()).vector, expert, tiny_bert().state_dict())


def test_statistics_are_no_part_of_the_task_vector() -> None:
    expert = fine_tuned(TinyConvNet)
    opened = open_expert(expert, TinyConvNet())
    assert set(opened.vector) == set(dict(expert.named_parameters()))
    assert opened.statistics is not None
    assert torch.equal(opened.statistics.read("norm.running_var"), expert.norm.running_var)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        open_expert(tmp_path / "nowhere", tiny_bert())
    with pytest.raises(FormatError, match="neither"):
        open_expert(tmp_path, tiny_bert())
    with pytest.raises(OptionError, match="revision"):
        open_expert(tmp_path, tiny_bert(), revision="main")


def test_pickle_needs_a_flag(tmp_path: Path) -> None:
    torch.save(state(fine_tuned()), tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="can run code"):
        open_expert(tmp_path, tiny_bert())
    opened = open_expert(tmp_path, tiny_bert(), allow_pickle=True)
    check(opened.vector, fine_tuned().state_dict(), tiny_bert().state_dict())


def test_one_safetensors_file_is_an_expert(tmp_path: Path) -> None:
    save_file(state(fine_tuned()), tmp_path / "x.safetensors")
    opened = open_expert(tmp_path / "x.safetensors", tiny_bert())
    assert opened.folder is None
    check(opened.vector, fine_tuned().state_dict(), tiny_bert().state_dict())


def test_a_base_that_stores_tied_embeddings_twice_fits_experts_that_store_them_once(tmp_path: Path) -> None:
    """Exporters other than transformers write both; a model loaded from such a file has, and saves, one."""
    base, expert = tiny_gpt2(), fine_tuned(tiny_gpt2)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    tensors = {name: tensor.contiguous().clone() for name, tensor in base.state_dict().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    opened = open_expert(tmp_path / "expert", tmp_path / "base")
    assert (opened.extra, opened.missing) == ((), ())
    check(opened.vector, state(expert), tensors)
    assert torch.equal(dense(opened.vector["lm_head.weight"]), dense(opened.vector["transformer.wte.weight"]))
    merged = merge(tmp_path / "base", [tmp_path / "expert"], output=tmp_path / "merged")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        found = type(base).from_pretrained(merged).eval()(tokens).logits
        torch.testing.assert_close(found, expert.eval()(tokens).logits, rtol=1e-5, atol=1e-5)

    tensors["lm_head.weight"][0, 0] += 1  # no copy any more: a head of its own
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"lm_head\.weight is missing"):
        open_expert(tmp_path / "expert", tmp_path / "base")


def test_complex_weights_are_refused_unless_they_are_the_base_s() -> None:
    """They would stay the base's: tables of rotations may, trained filters may not."""
    base = {"w": torch.ones(3, 3), "filters": torch.ones(4, dtype=torch.complex64)}
    expert = {"w": torch.ones(3, 3) + 0.1, "filters": base["filters"].clone()}
    assert open_expert(expert, base).extra == ()
    expert["filters"] = 1j * base["filters"]
    with pytest.raises(UnsupportedError, match=r"state dict has complex weights: filters\. Only real"):
        open_expert(expert, base)
