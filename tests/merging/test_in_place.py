"""What the model holds inside the block equals what merging folders writes, and afterwards nothing happened."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import BaseMismatchError, NonFiniteError, OptionError
from mergeready.experts import LiveExpert, open_expert
from mergeready.merging import MergedInPlace, in_place, merge, merge_folders, method_names
from tests.experts.test_peft_lora import VARIANTS, Variant, logits, trained
from tests.merging.methods import built
from tests.merging.worlds import World, adapted, equal, make_world, state, tensors_of
from tests.models import TinyConvNet, perturb, tiny_bert, token_batch

SCALES = (1.0, 0.3, -0.5, 0.0)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("plain"))


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


def held(live: LiveExpert) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live.targets.items()}


@pytest.mark.parametrize("method", method_names())
def test_a_full_model_equals_the_folders(world: World, method: str, tmp_path: Path) -> None:
    model = copy.deepcopy(world.experts[0])
    experts, weights = world.folders, [1.0, 0.5]
    before = bits(model)
    made = built(method, state(world.base), 2)
    with MergedInPlace(model, world.base_folder, experts[1:], made, weights=weights) as merged:
        for scale in SCALES:
            merged.set_scale(scale)
            out = merge_folders(
                world.base_folder,
                experts,
                tmp_path / "out",
                made,
                scale=scale,
                weights=weights,
                overwrite=True,
            )
            assert equal(held(merged.live), tensors_of(out)), scale
            assert bits(model) != before
    assert bits(model) == before


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("base_inside", [True, False])
def test_an_adapter_equals_the_folders(world: World, method: str, base_inside: bool, tmp_path: Path) -> None:
    model = copy.deepcopy(world.adapter)
    experts = [world.adapter_folder, world.folders[0]]
    before = bits(model)
    base = None if base_inside else world.base_folder
    made = built(method, state(world.base), 2)
    with MergedInPlace(model, base, experts[1:], made) as merged:
        for scale in SCALES:
            merged.set_scale(scale)
            out = merge_folders(
                world.base_folder, experts, tmp_path / "out", made, scale=scale, overwrite=True
            )
            assert equal(held(merged.live), tensors_of(out)), scale
    assert bits(model) == before


SEVERAL = ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
SEVERAL += ["breadcrumbs", "consensus", "della", "model_stock", "pcb"]


@pytest.mark.parametrize("method", SEVERAL)
def test_several_experts_of_both_kinds_equal_the_folders(world: World, method: str, tmp_path: Path) -> None:
    model = copy.deepcopy(world.experts[0])
    experts, weights = [*world.folders, world.adapter_folder], [1.0, 0.5, 2.0]
    out = merge_folders(world.base_folder, experts, tmp_path / "out", method, scale=0.4, weights=weights)
    with MergedInPlace(model, world.base_folder, experts[1:], method, scale=0.4, weights=weights) as merged:
        assert equal(held(merged.live), tensors_of(out))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_lora_variant_equals_the_folders(variant: Variant, method: str, tmp_path: Path) -> None:
    base, model = trained(variant)
    _, other = trained(variant, seed=7)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "own")
    before = bits(model)
    out = merge_folders(base, [tmp_path / "own", tmp_path / "other"], tmp_path / "out", method, scale=0.7)
    merged_model = copy.deepcopy(base)
    merged_model.load_state_dict(tensors_of(out), strict=False)
    with MergedInPlace(model, base, [tmp_path / "other"], method, scale=0.7) as merged:
        written = tensors_of(out)
        assert all(torch.equal(tensor, written[name]) for name, tensor in held(merged.live).items())
        torch.testing.assert_close(logits(model), logits(merged_model), rtol=1e-5, atol=1e-5)
    assert bits(model) == before


def test_the_model_computes_with_the_merged_weights(plain: World) -> None:
    model = copy.deepcopy(plain.experts[0])
    expected = merge(plain.base, plain.experts, scale=0.5)
    own = logits(model)
    with MergedInPlace(model, plain.base_folder, plain.folders[1:], scale=0.5):
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(model), own, atol=1e-3)
    assert torch.equal(logits(model), own)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("peft", [False, True])
def test_nothing_happened_if_the_block_raises(plain: World, error: type[BaseException], peft: bool) -> None:
    model = copy.deepcopy(plain.adapter if peft else plain.experts[0])
    model.train()
    next(model.children()).eval()
    before = bits(model)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def evaluate() -> None:
        with MergedInPlace(model, plain.base_folder, plain.folders[1:], "ties") as merged:
            merged.set_scale(0.3)
            model.eval()
            model.requires_grad_(False)
            torch.rand(7)
            assert bits(model) != before
            raise error

    with pytest.raises(error):
        evaluate()
    assert bits(model) == before
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.rand(3), expected)
    assert not peft or not torch.allclose(logits(model.eval()), logits(plain.base), atol=1e-3)


def test_a_write_that_fails_on_entry_is_undone(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(plain.experts[0])
    before = bits(model)
    calls = itertools.count()
    real = in_place.add_delta

    def failing(*arguments: object) -> Tensor:
        if next(calls) == 5:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(in_place, "add_delta", failing)
    block = MergedInPlace(model, plain.base_folder, plain.folders[1:])
    with pytest.raises(MemoryError):
        block.__enter__()
    assert bits(model) == before


def test_training_goes_on_as_if_nothing_had_happened(plain: World) -> None:
    def train(probe: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = copy.deepcopy(plain.experts[0]).train()  # with dropout, so that random state counts
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            model(**token_batch(step), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
            if probe:
                with MergedInPlace(model, plain.base_folder, plain.folders[1:], "dare_ties"), torch.no_grad():
                    model(**token_batch(9))
            optimizer.step()
            optimizer.zero_grad()
        return state(model)

    assert equal(train(probe=True), train(probe=False))


def test_without_the_model_and_without_experts_it_is_the_base(plain: World) -> None:
    for model in (copy.deepcopy(plain.experts[0]), copy.deepcopy(plain.adapter)):
        with MergedInPlace(model, plain.base_folder, [], include_model=False) as merged:
            assert equal(held(merged.live), state(plain.base))
            torch.testing.assert_close(logits(model), logits(plain.base), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", method_names())
def test_without_the_model_only_the_others_are_merged(plain: World, method: str, tmp_path: Path) -> None:
    model = copy.deepcopy(plain.experts[0])
    others = [plain.folders[1], plain.adapter_folder]
    made = built(method, state(plain.base), 2)
    out = merge_folders(plain.base_folder, others, tmp_path / "out", made)
    with MergedInPlace(model, plain.base_folder, others, made, include_model=False) as merged:
        assert equal(held(merged.live), tensors_of(out))


def test_frozen_parameters_take_what_the_others_bring(plain: World, tmp_path: Path) -> None:
    model = perturb_only_the_head(plain)
    model.save_pretrained(tmp_path / "own")
    out = merge_folders(plain.base_folder, [tmp_path / "own", plain.folders[1]], tmp_path / "out", scale=0.5)
    with MergedInPlace(model, plain.base_folder, plain.folders[1:], scale=0.5) as merged:
        assert set(merged.live.vector) == {"classifier.weight", "classifier.bias"}
        assert equal(held(merged.live), tensors_of(out))


def perturb_only_the_head(world: World) -> nn.Module:
    model = copy.deepcopy(world.base)
    model.bert.requires_grad_(False)
    return perturb(model, 1, 0.1)


def test_a_head_of_its_own_keeps_its_values(plain: World) -> None:
    model = copy.deepcopy(plain.experts[0])
    head = model.classifier.weight.detach().clone()
    with MergedInPlace(model, plain.base.bert, [plain.experts[1]], scale=0.5):
        assert torch.equal(model.classifier.weight, head)
        assert not torch.equal(model.bert.pooler.dense.weight, plain.experts[0].bert.pooler.dense.weight)


def test_running_statistics_stay_the_model_s_own() -> None:
    base, model = TinyConvNet(), perturb(TinyConvNet(), 1)
    model.train()(torch.randn(8, 3, 6, 6))
    own = model.norm.running_mean.clone()
    with MergedInPlace(model, base, [perturb(TinyConvNet(), 2)]):
        assert torch.equal(model.norm.running_mean, own)
        model(torch.randn(8, 3, 6, 6))
        assert not torch.equal(model.norm.running_mean, own)
    assert torch.equal(model.norm.running_mean, own)


def test_it_follows_training_from_one_block_to_the_next(plain: World) -> None:
    model = copy.deepcopy(plain.experts[0])
    block = MergedInPlace(model, plain.base_folder, [], scale=0.5)
    with block:
        first = held(block.live)
    with torch.no_grad():
        model.classifier.weight += 1
    with block:
        moved = held(block.live)["classifier.weight"] - first["classifier.weight"]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))


def test_a_live_expert_may_be_used_again(plain: World) -> None:
    live = LiveExpert(copy.deepcopy(plain.experts[0]), plain.base_folder)
    other = open_expert(plain.folders[1], live.base)
    with MergedInPlace(live, None, [other], "average") as merged:
        assert merged.live is live
        assert equal(held(live), merge(state(plain.base), plain.experts, "average"))


def test_the_scale_belongs_to_the_block(plain: World) -> None:
    block = MergedInPlace(copy.deepcopy(plain.experts[0]), plain.base_folder, [])
    with pytest.raises(OptionError, match="only be set inside"):
        block.set_scale(1.0)
    with block, pytest.raises(OptionError, match="`scale` must be finite"):
        block.set_scale(float("nan"))
    with pytest.raises(OptionError, match="only be set inside"):
        block.set_scale(1.0)


def test_inputs_are_checked_before_the_model_is_touched(plain: World) -> None:
    model = copy.deepcopy(plain.experts[0])
    with pytest.raises(OptionError, match="`weights` has 1 values for 2 experts"):
        MergedInPlace(model, plain.base_folder, plain.folders[1:], weights=[1.0])
    with pytest.raises(OptionError, match="`scale` must be finite"):
        MergedInPlace(model, plain.base_folder, [], scale=float("inf"))
    with pytest.raises(OptionError, match="no merge method"):
        MergedInPlace(model, plain.base_folder, [], "tis")
    with pytest.raises(BaseMismatchError):
        MergedInPlace(model, plain.base_folder, [tiny_bert(seed=5)])
    with pytest.raises(BaseMismatchError):
        MergedInPlace(adapted(plain.base, seed=1), tiny_bert(seed=5), [])


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("whose", ["own", "other"])
def test_nan_is_named_and_the_model_stays_as_it_was(plain: World, method: str, whose: str) -> None:
    model = copy.deepcopy(plain.experts[0])
    other = state(plain.experts[1])
    with torch.no_grad():
        (model.classifier.weight if whose == "own" else other["classifier.weight"])[0, 1] = float("nan")
    before = bits(model)
    label = "this run" if whose == "own" else "state dict"
    block = MergedInPlace(model, plain.base_folder, [other], built(method, state(plain.base), 2))
    with pytest.raises(NonFiniteError, match=rf"values in {label}: classifier\.weight"):
        block.__enter__()
    assert bits(model) == before
