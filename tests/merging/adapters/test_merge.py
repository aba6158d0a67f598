"""Adapters merged into an adapter: PEFT loads it and computes what merging in the weights computes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from mergeready.errors import (
    BaseMismatchError,
    MergeReadyError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    UnsupportedError,
)
from mergeready.experts import Base, open_expert
from mergeready.merging import make_method, merge
from mergeready.merging.adapters import merge_adapters
from mergeready.merging.information import Collected
from tests.experts.mlx_files import random_adapter, write_adapter
from tests.experts.test_adapterhub import GOLDENS
from tests.experts.test_case_table import tiny_mixtral
from tests.experts.test_peft_lora import VARIANTS, Variant, logits, trained
from tests.merging.methods import made_up_fisher
from tests.merging.worlds import adapted, state
from tests.models import perturb, tiny_bert, tiny_gpt2, tiny_llama


@dataclass
class Pair:
    base: nn.Module
    a: Path
    b: Path

    @property
    def both(self) -> list[Path]:
        return [self.a, self.b]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant: Variant = request.param
    root = tmp_path_factory.mktemp("pair")
    for name, seed in (("a", 1), ("b", 2)):
        base, model = trained(variant, seed)
        model.save_pretrained(root / name)
    return Pair(base, root / "a", root / "b")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root, base = tmp_path_factory.mktemp("plain"), tiny_bert()
    adapted(base, 1, lora_alpha=12).save_pretrained(root / "a")
    adapted(base, 2, r=2, target_modules=["query", "key", "dense"]).save_pretrained(root / "b")
    return Pair(base, root / "a", root / "b")


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """What PEFT makes of a folder; unknown and missing tensors are errors."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    here = {name for name in load_file(folder / "adapter_model.safetensors") if "lora_" in name}
    there = {n.replace(".default", "") for n, _ in model.named_parameters() if "lora_" in n}
    assert here == there
    return model


def computes(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=2e-5, atol=2e-5)


def has_dora(base: nn.Module, folder: Path) -> bool:
    return any(slot.dora for slot in open_expert(folder, base).vector.slots.values())


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_exact_merges_act_as_merged_weights(pair: Pair, method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method, "weights": [0.7, -0.4], "scale": 0.5}
    if has_dora(pair.base, pair.a):
        with pytest.raises(UnsupportedError, match="DoRA is not low-rank: choose `rank`"):
            merge_adapters(pair.base, pair.both, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    made = merge_adapters(pair.base, pair.both, tmp_path / "out", **options)
    expected = logits(merge(pair.base, pair.both, **options))
    assert not torch.allclose(expected, logits(pair.base), atol=1e-3)
    computes(loaded(pair.base, made.folder), expected)
    computes(merge(pair.base, [made.folder]), expected)
    assert (made.energy, made.kept, made.rounding) == (1.0, {}, 0.0)


def test_identity_one_hot_twins_order_and_negation(pair: Pair, tmp_path: Path) -> None:
    if has_dora(pair.base, pair.a):
        return
    alone = logits(merge(pair.base, [pair.a]))
    swapped = logits(merge(pair.base, pair.both, weights=[0.5, 0.25]))
    cases: list[tuple[list[Path], list[float], Tensor]] = [
        ([pair.a], [1.0], alone),
        (pair.both, [1.0, 0.0], alone),
        ([pair.b, pair.a], [0.0, 1.0], alone),
        ([pair.a, pair.a], [0.5, 0.5], alone),
        ([pair.b, pair.a], [0.25, 0.5], swapped),
        ([pair.a, pair.a], [1.0, -1.0], logits(pair.base)),
    ]
    for index, (experts, weights, expected) in enumerate(cases):
        out = tmp_path / str(index)
        rank = 64 if index % 2 else "exact"  # as exact, since no merge here has a rank of more
        merge_adapters(pair.base, experts, out, weights=weights, rank=rank)
        computes(merge(pair.base, [out]) if index else loaded(pair.base, out), expected)


def test_a_merge_may_be_merged_again(plain: Pair, tmp_path: Path) -> None:
    first = merge_adapters(plain.base, plain.both, tmp_path / "first", weights=[0.5, 0.5]).folder
    second = merge_adapters(plain.base, [first, plain.a], tmp_path / "second", weights=[1.0, -0.5]).folder
    computes(loaded(plain.base, second), logits(merge(plain.base, [plain.b], weights=[0.5])))


@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9])
def test_compression_says_what_it_kept(plain: Pair, tmp_path: Path, rank: int | float) -> None:
    made = merge_adapters(plain.base, plain.both, tmp_path / "out", rank=rank)
    whole = merge(plain.base, plain.both).state_dict()
    cut = merge(plain.base, [made.folder]).state_dict()
    start = plain.base.state_dict()
    total = held = 0.0
    for name, share in made.kept.items():
        delta = (whole[name] - start[name]).double()
        spectrum = torch.linalg.svdvals(delta).square()
        kept = made.ranks[name]
        assert share == pytest.approx(float(spectrum[:kept].sum() / spectrum.sum()), abs=1e-4)
        assert kept <= rank if isinstance(rank, int) else share >= rank - 1e-5
        lost = (cut[name] - whole[name]).double().square().sum()
        assert float(lost) == pytest.approx(float(spectrum[kept:].sum()), rel=1e-2, abs=1e-5)
        total, held = total + float(spectrum.sum()), held + float(spectrum[:kept].sum())
    assert set(made.kept) == set(made.ranks)
    assert made.energy == pytest.approx(held / total, abs=1e-4)
    record = json.loads((made.folder / "mergeready.json").read_text())["merge"]
    assert record["adapter"]["kept_energy"] == made.energy
    assert record["adapter"]["kept_energy_by_parameter"] == made.kept
    assert f"kept {made.energy:.1%}" in " ".join(made.summary())
    computes(loaded(plain.base, made.folder), logits(merge(plain.base, [made.folder])))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_methods_of_full_rank_need_a_rank(plain: Pair, tmp_path: Path, method: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{method} gives changes of full rank: choose `rank`"):
        merge_adapters(plain.base, plain.both, tmp_path / "out", method, density=0.5)
    made = merge_adapters(plain.base, plain.both, tmp_path / "all", method, density=0.5, rank=64)
    assert made.energy == pytest.approx(1.0, abs=1e-5)
    expected = logits(merge(plain.base, plain.both, method, density=0.5))
    torch.testing.assert_close(logits(loaded(plain.base, made.folder)), expected, rtol=1e-4, atol=1e-4)
    few = merge_adapters(plain.base, plain.both, tmp_path / "few", method, density=0.5, rank=4)
    assert 0.1 < few.energy < 0.95


def test_overrides_may_mix_exact_methods_only(plain: Pair, tmp_path: Path) -> None:
    overrides = {"layer.0": {"method": "average"}, "layer.1": {"scale": 0.3}}
    made = merge_adapters(plain.base, plain.both, tmp_path / "out", overrides=overrides)
    computes(loaded(plain.base, made.folder), logits(merge(plain.base, plain.both, overrides=overrides)))
    with pytest.raises(UnsupportedError, match=r"layer\.0.*ties gives"):
        merge_adapters(plain.base, plain.both, tmp_path / "no", overrides={"layer.0": {"method": "ties"}})


def test_data_about_experts_must_be_theirs(plain: Pair, tmp_path: Path) -> None:
    fishers = [made_up_fisher(state(plain.base), seed) for seed in (0, 1)]
    made = merge_adapters(plain.base, plain.both, tmp_path / "out", "fisher", fisher=fishers, rank=64)
    expected = logits(merge(plain.base, plain.both, "fisher", fisher=fishers))
    torch.testing.assert_close(logits(loaded(plain.base, made.folder)), expected, rtol=1e-4, atol=1e-4)
    values = {name: fishers[1].read(name) for name in fishers[1].infos}
    strange = Collected(values, "fisher", Base.open(tiny_bert(seed=5)).identity)
    with pytest.raises(BaseMismatchError, match="fisher was made for another base"):
        merge_adapters(
            plain.base, plain.both, tmp_path / "no", "fisher", fisher=[fishers[0], strange], rank=4
        )
    with pytest.raises(OptionError, match="`fisher` has 1 sources for 2 experts"):
        merge_adapters(plain.base, plain.both, tmp_path / "no", "fisher", fisher=fishers[:1], rank=4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_data_are_found_by_an_expert_s_place_so_none_may_be_left_out(
    plain: Pair, tmp_path: Path, wrapped: bool
) -> None:
    fishers = [made_up_fisher(state(plain.base), seed) for seed in (0, 1)]
    method = make_method("fisher", fisher=fishers)
    method = make_method("svc", inner=method) if wrapped else method
    with pytest.raises(OptionError, match="fisher has data about all experts: `absent` must be unchanged"):
        merge_adapters(plain.base, plain.both, tmp_path / "no", method, absent="left_out", rank=4)
    overrides = {"query": {"method": method}}
    with pytest.raises(OptionError, match="fisher has data about all experts"):
        merge_adapters(
            plain.base, plain.both, tmp_path / "no", overrides=overrides, absent="left_out", rank=4
        )


def test_a_mean_over_all_or_over_those_that_have_it(plain: Pair, tmp_path: Path) -> None:
    key, value = (f"bert.encoder.layer.0.attention.self.{n}.weight" for n in ("key", "value"))
    deltas = {}
    for absent in ("unchanged", "left_out"):
        made = merge_adapters(plain.base, plain.both, tmp_path / absent, "average", absent=absent)
        vector = open_expert(made.folder, plain.base).vector
        deltas[absent] = {name: vector[name].norm() for name in (key, value)}
    for name in (key, value):  # each is adapted by one of the two
        assert deltas["left_out"][name] == pytest.approx(2 * deltas["unchanged"][name], rel=1e-5)


def test_different_targets_and_ranks(plain: Pair, tmp_path: Path) -> None:
    made = merge_adapters(plain.base, plain.both, tmp_path / "out")
    a, b = (set(open_expert(folder, plain.base).vector) for folder in plain.both)
    jaccard = len(a & b) / len(a | b)
    assert made.overlap == [[1.0, jaccard], [jaccard, 1.0]]
    assert jaccard < 1
    assert f"Jaccard index down to {jaccard:.2f}" in " ".join(made.summary())
    assert set(made.ranks) == a | b
    assert {made.ranks[name] for name in a & b} == {6}
    assert {made.ranks[name] for name in a - b} == {4}


def test_formats_mix(tmp_path: Path) -> None:
    base = tiny_llama()
    adapted(base, 1, target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    write_adapter(tmp_path / "mlx", random_adapter(base, ["v_proj", "q_proj"]))
    both = [tmp_path / "peft", tmp_path / "mlx"]
    made = merge_adapters(base, both, tmp_path / "out", weights=[0.5, 0.1])
    computes(loaded(base, made.folder), logits(merge(base, both, weights=[0.5, 0.1])))


def test_adapterhub_adapters_become_peft_s(tmp_path: Path) -> None:
    model = GOLDENS / "gpt2"
    base = GPT2LMHeadModel.from_pretrained(model / "base").eval()
    made = merge_adapters(model / "base", [model / "fused-qv", model / "everywhere"], tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = merge(base, [model / "fused-qv", model / "everywhere"])(input_ids=ids).logits
        torch.testing.assert_close(
            loaded(base, made.folder)(input_ids=ids).logits, expected, rtol=2e-5, atol=2e-5
        )


def test_one_adapts_what_another_trained_whole(tmp_path: Path) -> None:
    base = tiny_bert()
    adapted(base, 1, target_modules=["query"], modules_to_save=["pooler.dense"]).save_pretrained(
        tmp_path / "a"
    )
    adapted(base, 2, target_modules=["query", "dense"]).save_pretrained(tmp_path / "b")
    both = [tmp_path / "a", tmp_path / "b"]
    made = merge_adapters(base, both, tmp_path / "out")
    computes(loaded(base, made.folder), logits(merge(base, both)))


def test_folding_is_merging_folders(plain: Pair, tmp_path: Path) -> None:
    plain.base.save_pretrained(tmp_path / "base")
    made = merge_adapters(tmp_path / "base", plain.both, tmp_path / "out", "ties", output_format="full")
    model = type(plain.base).from_pretrained(made.folder).eval()
    computes(model, logits(merge(plain.base, plain.both, "ties")))
    assert made.format == "full"
    with pytest.raises(OptionError, match="belong to adapters"):
        merge_adapters(tmp_path / "base", plain.both, tmp_path / "no", output_format="full", rank=4)


def test_a_narrow_dtype_and_its_rounding(plain: Pair, tmp_path: Path) -> None:
    made = merge_adapters(plain.base, plain.both, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 1e-4 < made.rounding < 1e-2
    assert "narrower dtype" in " ".join(made.summary())


def test_the_record_knows_the_base(plain: Pair, tmp_path: Path) -> None:
    made = merge_adapters(plain.base, plain.both, tmp_path / "out")
    assert open_expert(made.folder, plain.base).base_checked == "recorded"
    with pytest.raises(BaseMismatchError):
        open_expert(made.folder, tiny_bert(seed=5))
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in (made.folder / "mergeready.json").read_text()


def test_an_existing_output_is_refused_untouched(plain: Pair, tmp_path: Path) -> None:
    merge_adapters(plain.base, plain.both, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError):
        merge_adapters(plain.base, plain.both, tmp_path / "out", scale=2.0)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    merge_adapters(plain.base, plain.both, tmp_path / "out", scale=2.0, overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_notes_of_experts_are_passed_on(tmp_path: Path) -> None:
    base = tiny_llama()
    model = "org/llama-4bit"
    write_adapter(tmp_path / "a", random_adapter(base, ["q_proj"]), model=model)
    made = merge_adapters(base, [tmp_path / "a", tmp_path / "a"], tmp_path / "out")
    assert len(made.notes) == 1
    assert f"quantised {model}" in " ".join(made.summary())
    assert json.loads((made.folder / "mergeready.json").read_text())["merge"]["adapter"]["notes"] == [
        *made.notes
    ]


def test_full_models_have_no_form_as_an_adapter(plain: Pair, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="live BertForSequenceClassification are no adapters"):
        merge_adapters(plain.base, [plain.a, perturb(tiny_bert(), 1)], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_format": "mlx"}, OptionError, "`output_format` must be"),
        ({"absent": "zero"}, OptionError, "`absent` must be"),
        ({"rank": 1.5}, OptionError, "`rank` must be"),
        ({"weights": [1.0]}, OptionError, "1 values for 2 experts"),
        ({"dtype": torch.int8}, OptionError, "floating dtype"),
        ({"density": 0.5}, OptionError, "no parameter density"),
        ({"scale": 1e30, "dtype": torch.float16}, NonFiniteError, "Nothing was written"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(
    plain: Pair, tmp_path: Path, options: dict[str, Any], error: type[MergeReadyError], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_adapters(plain.base, plain.both, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_experts(plain: Pair, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`experts` is empty"):
        merge_adapters(plain.base, [], tmp_path / "out")


def test_trained_rows_of_different_tokens_are_joined(tmp_path: Path) -> None:
    base = tiny_gpt2()
    folders = []
    for seed, rows in ((1, [3, 7]), (2, [7, 9])):
        model = adapted(base, seed, target_modules=["c_attn"], trainable_token_indices={"wte": rows})
        model.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        folders.append(tmp_path / str(seed))
    made = merge_adapters(base, folders, tmp_path / "out", weights=[0.5, 0.25])
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"transformer.wte": [3, 7, 9]}
    expected = logits(merge(base, folders, weights=[0.5, 0.25]))
    computes(merge(base, [made.folder]), expected)
    computes(loaded(base, made.folder), expected)


def test_stacks_of_experts_can_only_be_folded(tmp_path: Path) -> None:
    base = tiny_mixtral()
    adapted(base, 1, target_modules=["q_proj"], target_parameters=["experts.down_proj"]).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UnsupportedError, match="stacks of experts can only be folded"):
        merge_adapters(base, [tmp_path / "a"], tmp_path / "out")
