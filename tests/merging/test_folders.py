from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mergeready.errors import (
    BaseMismatchError,
    FormatError,
    MismatchError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    UnsupportedError,
)
from mergeready.experts import open_expert
from mergeready.merging import make_method, merge, merge_folders, method_names
from tests.merging.methods import built
from tests.merging.worlds import World, close, equal, make_world, state, summed, tensors_of
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("weights", [None, [0.5, -0.25]])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_values_are_those_of_the_formula(
    world: World, tmp_path: Path, weights: list[float] | None, scale: float
) -> None:
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=scale, weights=weights)
    assert out == tmp_path / "out"
    close(tensors_of(out), summed(world.base, world.experts, weights or [1.0, 1.0], scale))


def test_transformers_loads_the_result(world: World, tmp_path: Path) -> None:
    merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=0.5)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    expected = tiny_bert()
    expected.load_state_dict(
        {n: t.float() for n, t in summed(world.base, world.experts, [1, 1], 0.5).items()}
    )
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**token_batch()).logits, expected(**token_batch()).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("method", method_names())
def test_shards_hold_the_same(world: World, tmp_path: Path, method: str) -> None:
    made = built(method, state(world.base), 2)
    whole = merge_folders(world.base_folder, world.folders, tmp_path / "whole", made)
    parts = merge_folders(world.base_folder, world.folders, tmp_path / "parts", made, shard_bytes=20_000)
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert equal(tensors_of(whole), tensors_of(parts))
    BertForSequenceClassification.from_pretrained(parts)


def test_sharded_inputs_give_the_same(world: World, tmp_path: Path) -> None:
    world.base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    world.experts[0].save_pretrained(tmp_path / "expert", max_shard_size="30KB")
    a = merge_folders(world.base_folder, world.folders, tmp_path / "a", "ties")
    b = merge_folders(tmp_path / "base", [tmp_path / "expert", world.folders[1]], tmp_path / "b", "ties")
    assert equal(tensors_of(a), tensors_of(b))


def test_experts_of_every_kind_mix(world: World, tmp_path: Path) -> None:
    kinds = [
        world.folders[0],
        str(world.folders[0]),
        world.experts[0],
        state(world.experts[0]),
        world.adapter_folder,
        open_expert(world.adapter_folder, world.base),
        open_expert(world.adapter_folder, world.base).vector,
    ]
    out = merge_folders(world.base_folder, kinds, tmp_path / "out", scale=0.1)
    adapter = tiny_bert()
    adapter.load_state_dict(state(world.base))
    vector = open_expert(world.adapter_folder, world.base).vector
    for name, parameter in adapter.named_parameters():
        if name in vector:
            parameter.data += vector.flat(name, 0, parameter.numel()).reshape(parameter.shape)
    experts = [world.experts[0]] * 4 + [adapter] * 3
    close(tensors_of(out), summed(world.base, experts, [1.0] * 7, 0.1))


def test_what_no_expert_changes_is_the_base_bit_for_bit(world: World, tmp_path: Path) -> None:
    merged = tensors_of(merge_folders(world.base_folder, [world.adapter_folder], tmp_path / "out", "ties"))
    changed = set(open_expert(world.adapter_folder, world.base).vector)
    assert len(changed) == 4
    for name, tensor in state(world.base).items():
        assert torch.equal(merged[name], tensor) == (name not in changed)


def test_the_base_may_be_in_memory(world: World, tmp_path: Path) -> None:
    expected = tensors_of(merge_folders(world.base_folder, world.folders, tmp_path / "folder"))
    for i, base in enumerate((world.base, world.base.state_dict())):
        out = merge_folders(base, world.folders, tmp_path / str(i))
        assert equal(tensors_of(out), expected)
        assert names(out) == ["README.md", "mergeready.json", "mergeready_merge.yaml", "model.safetensors"]


def test_the_folder_says_what_it_is(world: World, tmp_path: Path) -> None:
    method = make_method("dare_ties", density=0.25, seed=4)
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", method, scale=0.5, weights=[1, 2])
    record = json.loads((out / "mergeready.json").read_text())
    assert record["merge"] == {
        "method": "dare_ties",
        "density": 0.25,
        "seed": 4,
        "scale": 0.5,
        "weights": [1.0, 2.0],
        "experts": 2,
    }
    assert str(world.root) not in (out / "mergeready.json").read_text()
    assert (out / "config.json").read_bytes() == (world.base_folder / "config.json").read_bytes()
    again = open_expert(out, world.base_folder)
    assert again.base_checked == "recorded"
    with pytest.raises(BaseMismatchError):
        open_expert(out, tiny_bert(seed=5))


def test_another_dtype(world: World, tmp_path: Path) -> None:
    exact = summed(world.base, world.experts, [1, 1], 1.0)
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", dtype=torch.bfloat16)
    merged = tensors_of(out)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    close(merged, exact, rtol=2**-8, atol=1e-6)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    before = json.loads((world.base_folder / "config.json").read_text())
    assert before["dtype"] == "float32"
    assert config == before | {"dtype": "bfloat16"}
    loaded = BertForSequenceClassification.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_another_dtype_under_the_old_name_of_the_setting(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    world.base.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    out = merge_folders(base, world.folders, tmp_path / "out", dtype=torch.float16)
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "float16"}


def test_only_weights_change_their_dtype(tmp_path: Path) -> None:
    base, expert = TinyConvNet(), perturb(TinyConvNet(), 1)
    out = merge_folders(base, [expert], tmp_path / "out", dtype=torch.bfloat16)
    dtypes = {name: t.dtype for name, t in tensors_of(out).items()}
    assert dtypes["conv.weight"] == torch.bfloat16
    assert dtypes["norm.running_mean"] == torch.float32
    assert dtypes["norm.num_batches_tracked"] == torch.int64


@pytest.mark.parametrize("how", ["base", "average"])
def test_running_statistics(tmp_path: Path, how: str) -> None:
    base, experts = TinyConvNet(), [perturb(TinyConvNet(), seed) for seed in (1, 2)]
    for expert in experts:
        expert.train()(torch.randn(8, 3, 6, 6))
    merged = tensors_of(merge_folders(base, experts, tmp_path / "out", statistics=how))
    means = torch.stack([expert.norm.running_mean for expert in experts]).double().mean(0)
    expected = base.norm.running_mean.double() if how == "base" else means
    torch.testing.assert_close(merged["norm.running_mean"].double(), expected, rtol=1e-6, atol=1e-7)
    assert int(merged["norm.num_batches_tracked"]) == 0
    net = TinyConvNet()
    net.load_state_dict(merged)
    assert bool(torch.isfinite(net(torch.randn(2, 3, 8, 8))).all())


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    base, expert = tiny_gpt2(), perturb(tiny_gpt2(), 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    out = merge_folders(tmp_path / "base", [tmp_path / "expert", expert], tmp_path / "out", "average")
    assert "lm_head.weight" not in tensors_of(out)
    loaded = GPT2LMHeadModel.from_pretrained(out).eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with torch.no_grad():
        batch = token_batch()
        torch.testing.assert_close(loaded(**batch).logits, expert(**batch).logits, rtol=1e-5, atol=1e-5)


KEEPING = ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
KEEPING += ["breadcrumbs", "consensus", "della", "della_linear", "model_stock"]


@pytest.mark.parametrize("method", KEEPING)
def test_odd_shapes(tmp_path: Path, method: str) -> None:
    base = {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3), "one": torch.ones(1), "m": torch.eye(3)}
    expert = {name: tensor + 0.5 for name, tensor in base.items()}
    merged = tensors_of(merge_folders(base, [expert], tmp_path / "out", method, **full_density(method)))
    assert equal(merged, expert)


def full_density(method: str) -> dict[str, float]:
    return {"density": 1.0} if "density" in vars(make_method(method)) else {}


def test_an_existing_output_is_refused_untouched(world: World, tmp_path: Path) -> None:
    merge_folders(world.base_folder, world.folders, tmp_path / "out")
    before = tensors_of(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="out exists"):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=2.0)
    assert equal(tensors_of(tmp_path / "out"), before)
    merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=2.0, overwrite=True)
    close(tensors_of(tmp_path / "out"), summed(world.base, world.experts, [1, 1], 2.0))
    assert names(tmp_path) == ["out"]


def test_the_output_may_take_the_place_of_an_input(world: World, tmp_path: Path) -> None:
    for model, name in ((world.base, "base"), (world.experts[0], "expert")):
        model.save_pretrained(tmp_path / name)
    for target in ("expert", "base"):
        merge_folders(tmp_path / "base", [tmp_path / "expert"], tmp_path / target, scale=0.5, overwrite=True)
    close(tensors_of(tmp_path / "expert"), summed(world.base, world.experts[:1], [1], 0.5))
    close(tensors_of(tmp_path / "base"), summed(world.base, world.experts[:1], [1], 0.25))


def test_further_modules_of_a_sentence_encoder(world: World, tmp_path: Path) -> None:
    """Their weights lie in folders of their own: the base's come along, an expert's own are not merged."""
    base = shutil.copytree(world.base_folder, tmp_path / "base")
    same, own = (shutil.copytree(world.folders[0], tmp_path / name) for name in ("same", "own"))
    for folder, value in ((base, 1.0), (same, 1.0), (own, 2.0)):
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        (folder / "2_Dense").mkdir()
        save_file({"linear.weight": torch.full((2, 2), value)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"own has weights of its own in 2_Dense.*strict=False"):
        merge_folders(base, [same, own], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for name, experts, strict in (("a", [same, world.adapter_folder], True), ("b", [own], False)):
        out = merge_folders(base, experts, tmp_path / name, strict=strict)
        assert load_file(out / "2_Dense" / "model.safetensors")["linear.weight"].tolist() == [[1, 1], [1, 1]]


def broken_expert(world: World, folder: Path, value: float) -> Path:
    world.experts[1].save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.pooler.dense.weight"][3, 4] = value
    tensors["classifier.bias"][:] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_with_nan_is_named_and_nothing_is_left(
    world: World, tmp_path: Path, method: str, value: float
) -> None:
    bad = broken_expert(world, tmp_path / "bad", value)
    merge_folders(world.base_folder, world.folders, tmp_path / "old")
    before = tensors_of(tmp_path / "old")
    for target in ("new", "old"):
        with pytest.raises(
            NonFiniteError,
            match=r"values in \S*bad: bert\.pooler\.dense\.weight, classifier\.bias\. Nothing was written",
        ):
            merge_folders(
                world.base_folder,
                [world.folders[0], bad],
                tmp_path / target,
                built(method, state(world.base), 2),
                overwrite=True,
            )
    assert names(tmp_path) == ["bad", "old"]
    assert equal(tensors_of(tmp_path / "old"), before)


def test_overflow_is_no_expert_s_fault(world: World, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"Nothing was written\. A scale or weight is too large"):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", scale=1e7, dtype=torch.float16)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("value", "dtype"), [(1e6, torch.float16), (float("nan"), None)])
def test_what_no_expert_changes_has_to_be_finite_as_well(
    world: World, tmp_path: Path, value: float, dtype: torch.dtype | None
) -> None:
    base = state(world.base)
    base["classifier.bias"][1] = value
    message = (
        r"after merging: classifier\.bias\. .*the dtype too narrow, or the base holds such values itself"
    )
    with pytest.raises(NonFiniteError, match=message):
        merge_folders(base, [world.adapter_folder], tmp_path / "out", dtype=dtype)
    with pytest.raises(NonFiniteError, match=message):
        merge(base, [world.adapter_folder], dtype=dtype)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "`weights` has 1 values for 2 experts"),
        ({"weights": [1.0, float("nan")]}, "`weights` must be finite"),
        ({"scale": float("inf")}, "`scale` must be finite"),
        ({"method": "tis"}, "there is no merge method"),
        ({"density": 0.5}, "task_arithmetic has no parameter density"),
        ({"dtype": torch.int8}, "`dtype` must be a floating dtype"),
        ({"statistics": "mean"}, "`statistics` must be base or average"),
        ({"shard_bytes": 0}, "`shard_bytes` must be positive"),
    ],
)
def test_options_are_checked_before_anything_is_written(
    world: World, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", **options)
    assert names(tmp_path) == []


def test_inputs_are_checked_before_anything_is_written(world: World, tmp_path: Path) -> None:
    other, beside = tiny_bert(seed=5), tmp_path / "out"
    incomplete = state(world.experts[0])
    del incomplete["classifier.bias"]
    cases = [
        ([], OptionError, "`experts` is empty"),
        ([world.folders[0], other], BaseMismatchError, "does not descend"),
        ([world.folders[0], tmp_path / "nowhere"], FormatError, "does not exist"),
        ([incomplete], MismatchError, r"classifier\.bias is missing"),
    ]
    for experts, error, message in cases:
        with pytest.raises(error, match=message):
            merge_folders(world.base_folder, experts, beside)
    with pytest.raises(FormatError, match="nobody/nothing-of-this-name"):
        merge_folders("nobody/nothing-of-this-name", world.folders, beside)
    assert names(tmp_path) == []


def test_a_base_whose_configuration_is_broken_is_refused_before_work(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base_folder, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_bytes(b'{"dtype": "float32"\xff')
    with pytest.raises(FormatError, match=r"config\.json cannot be read as JSON"):
        merge_folders(tmp_path / "base", world.folders, output=tmp_path / "out", dtype=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_leftovers_stay_out_unless_strict(world: World, tmp_path: Path) -> None:
    expert = state(world.experts[0]) | {"own.head": torch.ones(3)}
    del expert["classifier.bias"]
    out = merge_folders(world.base_folder, [expert], tmp_path / "out", strict=False)
    merged = tensors_of(out)
    assert "own.head" not in merged
    assert torch.equal(merged["classifier.bias"], state(world.base)["classifier.bias"])
    torch.testing.assert_close(merged["classifier.weight"], expert["classifier.weight"], rtol=1e-6, atol=1e-6)


def test_an_output_that_holds_an_input_is_refused(world: World, tmp_path: Path) -> None:
    world.base.save_pretrained(tmp_path / "models" / "base")
    world.base.save_pretrained(tmp_path / "models" / "expert")
    with pytest.raises(OptionError, match="is an input of this merge"):
        merge_folders(
            tmp_path / "models" / "base",
            [tmp_path / "models" / "expert"],
            tmp_path / "models",
            overwrite=True,
        )
    assert (tmp_path / "models" / "base" / "config.json").is_file()


def tied_llama() -> LlamaForCausalLM:
    config = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    words = {word: i for i, word in enumerate(["[UNK]", "merge", "ready", "law", "code"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard_bytes", [30_000, 10**9])
@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (tiny_llama, AutoModelForCausalLM),
        (tied_llama, AutoModelForCausalLM),
        (tiny_bert, AutoModelForSequenceClassification),
    ],
)
def test_from_pretrained_loads_model_and_tokenizer(
    tmp_path: Path, make: Callable[[], PreTrainedModel], auto: Any, shard_bytes: int
) -> None:
    base = with_tokenizer(make(), tmp_path / "base")
    experts = [perturb(make(), seed) for seed in (1, 2)]
    for i, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / f"expert-{i}")
    folders = [tmp_path / "expert-0", tmp_path / "expert-1"]
    out = merge_folders(base, folders, tmp_path / "out", "average", shard_bytes=shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes == 30_000)
    loaded, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    close(state(loaded), summed(make(), experts, [0.5, 0.5], 1.0))
    output, tied = loaded.get_output_embeddings(), bool(loaded.config.tie_word_embeddings)
    if output is not None:
        assert (output.weight is loaded.get_input_embeddings().weight) == tied
        assert ("lm_head.weight" in tensors_of(out)) != tied
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["merge", "code", "other"]) == [1, 4, 0]
    for path in base.glob("*token*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
