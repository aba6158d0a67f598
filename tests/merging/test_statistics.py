from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError
from mergeready.experts import open_expert
from mergeready.experts.open import Expert
from mergeready.merging import MergedInPlace, merge, merge_folders
from mergeready.merging.statistics import _warn_once, check_statistics, live_layers, merged_statistic
from mergeready.weights import StateDictSource
from tests.models import TinyConvNet, perturb

MEAN = "norm.running_mean"


def state(seed: int, **changes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    torch.manual_seed(seed)
    return {
        "norm.weight": weight + 0.01 * torch.randn(4, 4),
        MEAN: torch.randn(4),
        "norm.running_var": torch.rand(4),
        "norm.num_batches_tracked": torch.tensor(seed),
        "index": torch.arange(4) + seed,
    } | changes


def opened(*states: dict[str, Tensor]) -> list[Expert]:
    return [open_expert(s, state(0)) for s in states]


def merged(name: str, how: str, *states: dict[str, Tensor]) -> Tensor:
    return merged_statistic(name, StateDictSource(state(0)), opened(*states), how)


@pytest.mark.parametrize("name", [MEAN, "norm.running_var", "norm.num_batches_tracked", "index"])
def test_the_base_s_values_stay_unless_told(name: str) -> None:
    assert torch.equal(merged(name, "base", state(1), state(2)), state(0)[name])


@pytest.mark.parametrize("name", [MEAN, "norm.running_var"])
def test_the_average_is_over_the_experts(name: str) -> None:
    exact = torch.stack([state(seed)[name].double() for seed in (1, 2, 3)]).mean(0)
    ours = merged(name, "average", state(1), state(2), state(3))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["norm.num_batches_tracked", "index"])
def test_integers_are_never_averaged(name: str) -> None:
    assert torch.equal(merged(name, "average", state(1), state(2)), state(0)[name])


def test_the_base_s_dtype_stays() -> None:
    base = StateDictSource(state(0, **{MEAN: torch.zeros(4).bfloat16()}))
    ours = merged_statistic(MEAN, base, opened(state(1), state(2)), "average")
    assert ours.dtype == torch.bfloat16


def test_experts_without_the_statistic_do_not_count() -> None:
    without = state(1)
    del without[MEAN]
    torch.testing.assert_close(merged(MEAN, "average", without, state(2)), state(2)[MEAN])
    assert torch.equal(merged(MEAN, "average", without), state(0)[MEAN])


def test_adapters_and_task_vectors_have_none() -> None:
    (expert,) = opened(state(1))
    vector = open_expert(expert.vector, state(0))
    base = StateDictSource(state(0))
    assert torch.equal(merged_statistic(MEAN, base, [vector], "average"), state(0)[MEAN])
    assert torch.equal(merged_statistic(MEAN, base, [vector, expert], "average"), state(1)[MEAN])


def test_a_model_prefix_does_not_hide_an_expert_s_statistics() -> None:
    prefixed = {f"model.{name}": tensor for name, tensor in state(1).items()}
    torch.testing.assert_close(merged(MEAN, "average", prefixed), state(1)[MEAN])


def test_statistics_of_another_shape_are_refused() -> None:
    with pytest.raises(
        MismatchError, match=r"norm\.running_mean of state dict is \(5,\), in the base \(4,\)"
    ):
        merged(MEAN, "average", state(1, **{MEAN: torch.zeros(5)}))


def test_an_unknown_source_is_refused() -> None:
    assert check_statistics("base") == "base"
    assert check_statistics("average") == "average"
    with pytest.raises(OptionError, match="must be base or average, not 'mean'"):
        check_statistics("mean")


def net(seed: int, live: bool) -> TinyConvNet:
    model = perturb(TinyConvNet(), seed)
    if live:
        model.train()(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_layers_are_those_whose_statistics_moved(dtype: torch.dtype) -> None:
    base = TinyConvNet()
    base.train()(torch.randn(8, 3, 6, 6))  # statistics that bf16 must round
    for live, expected in ((True, ("norm",)), (False, ())):
        expert = copy.deepcopy(base)
        if live:
            expert(torch.randn(8, 3, 6, 6))
        source = StateDictSource(expert.to(dtype).state_dict())
        assert live_layers(StateDictSource(base.state_dict()), source) == expected
        prefixed = StateDictSource({f"model.{n}": t for n, t in source._tensors.items()})
        assert live_layers(StateDictSource(base.state_dict()), prefixed) == expected


def test_variance_alone_tells_too() -> None:
    base = state(0)
    assert live_layers(StateDictSource(base), StateDictSource(base | {MEAN: torch.ones(4)})) == ("norm",)
    moved = base | {"norm.running_var": base["norm.running_var"] + 1e-3}
    assert live_layers(StateDictSource(base), StateDictSource(moved)) == ("norm",)
    counted = base | {"norm.num_batches_tracked": torch.tensor(9)}
    assert live_layers(StateDictSource(base), StateDictSource(counted)) == ()
    assert live_layers(StateDictSource({"a": torch.ones(2)}), StateDictSource(base)) == ()


@pytest.mark.parametrize("statistics", ["base", "average"])
def test_merges_of_live_experts_warn_and_name_the_remedy(
    statistics: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    base, experts = TinyConvNet(), [net(seed, live=True) for seed in (1, 2)]
    for name, model in {"base": base, "a": experts[0], "b": experts[1]}.items():
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    folders = [tmp_path / "a", tmp_path / "b"]

    def in_place() -> None:
        with MergedInPlace(copy.deepcopy(experts[0]), base, [experts[1]]):
            pass

    merges = {
        "memory": lambda: merge(base, experts, statistics=statistics),
        "folders": lambda: merge_folders(tmp_path / "base", folders, tmp_path / "out", statistics=statistics),
        "in place": in_place,
    }
    for name, make in merges.items():
        _warn_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mergeready"):
            make()
        assert len(caplog.records) == 1, name
        assert "2 of 2 experts" in caplog.text
        assert "trained with live BatchNorm statistics in 1 layers" in caplog.text
        assert "mergeready.recalibrate" in caplog.text


def test_merges_of_frozen_experts_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    base, experts = TinyConvNet(), [net(seed, live=False) for seed in (1, 2)]
    with caplog.at_level(logging.WARNING, "mergeready"):
        merge(base, experts)
        merge(base, experts, statistics="average")
        with MergedInPlace(experts[0], base, [experts[1]]):
            pass
    assert not caplog.records


def test_the_same_warning_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "mergeready"):
        for _ in range(3):
            merge(TinyConvNet(), [net(1, live=True)])
    assert len(caplog.records) == 1
